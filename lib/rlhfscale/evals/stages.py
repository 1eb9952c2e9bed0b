"""The stages of the chat benchmarks, called as ``stage(spec, inputs, folder)`` in a worker process."""

import json
from pathlib import Path

import pandas as pd

from rlhfscale.evals import benchmarks, evaluate, mt_judged, planted, sources, specs
from rlhfscale.evals.judge import Cache
from rlhfscale.runs.spec import Inputs
from rlhfscale.runs.store import scratch


def mt_bench(spec: specs.MTBench, inputs: Inputs, folder: Path) -> None:
    """answers.csv (stage, question_id, turn, text), scores.csv (by stage; not for a judge that gives scores) and
    pairs.csv (model_1 is ``after``). Replies outlive a killed process."""
    questions = evaluate.subset(sources.mt_bench_questions(), spec.num_questions)
    prompts, turns = sources.mt_bench_prompts(), [question.turns for question in questions]
    opened = {source: evaluate.open_policy(source, spec.dtype) for source in {spec.before, spec.after}}
    given, answers = {}, []
    for stage in ("before", "after"):
        policy, temperature = opened[getattr(spec, stage)], getattr(spec, f"{stage}_temperature")
        decoding = {"max_new_tokens": spec.max_new_tokens, "temperature": temperature, "seed": spec.seed}
        given[stage] = benchmarks.answer(turns, policy.sample, policy.tokenizer, context=policy.context, **decoding)
        for question, texts in zip(questions, given[stage], strict=True):
            answers += [(stage, question.question_id, turn, text) for turn, text in enumerate(texts, 1)]
    pd.DataFrame(answers, columns=["stage", "question_id", "turn", "text"]).to_csv(folder / "answers.csv", index=False)
    judge = evaluate.open_judge(spec.judge, revision=spec.judge_revision, dtype=spec.dtype)
    about = {"max_missing": spec.max_missing, "max_tokens": spec.judge_tokens, "constrained": spec.constrained}
    with scratch(folder) as kept:
        ask = benchmarks.Ask(judge, Cache(kept), **about)
        if not judge.scores:
            tables = [mt_judged.mt_single(questions, prompts, given[s], ask).assign(stage=s) for s in given]
            pd.concat(tables).to_csv(folder / "scores.csv", index=False)
        pairs = mt_judged.mt_pairs(questions, prompts, given["after"], given["before"], ask)
        pairs.to_csv(folder / "pairs.csv", index=False)


def coverage(spec: specs.Coverage, inputs: Inputs, folder: Path) -> None:
    """coverage.json: share of the simulated evaluations by kind of interval."""
    shares = planted.coverage(**{name: getattr(spec, name) for name in specs.Coverage.model_fields})
    (folder / "coverage.json").write_text(json.dumps(shares) + "\n")
