"""``rlhfscale evaluate``: one policy before one benchmark, from its folder to a table.

Answers and judgments are kept as they come, so a run that was cut short goes on where it stopped.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.evals import alpaca_eval, benchmarks, logistic, mt_judged, sources
from rlhfscale.evals.benchmarks import Ask
from rlhfscale.evals.endpoint import Endpoint
from rlhfscale.evals.judge import Cache, Judge
from rlhfscale.evals.local_judges import Local, reward_judge
from rlhfscale.evals.revisions import SMOLLM2, folder_revision
from rlhfscale.models.files import replace_file
from rlhfscale.runs import paths

BOOTSTRAP_SEED = 20241209
JUDGES = "endpoint:MODEL, hf:FOLDER, vllm:FOLDER, reward:FOLDER, or verifier (gsm8k, math)"


@dataclass(frozen=True)
class Policy:
    """A model that answers.

    Attributes:
        sample, tokenizer, context: see `benchmarks.answer`.
        model: the transformers model.
        name: its folder's name.
        revision: see `revisions.folder_revision`.
    """

    sample: Callable[..., Any]
    tokenizer: Any
    context: int | None
    model: Any
    name: str
    revision: str


@dataclass(frozen=True)
class Decoding:
    """How a policy's answers are decoded.

    Attributes:
        max_new_tokens: of each answer.
        temperature: 0 is greedy.
        num_samples: answers to each problem (gsm8k, math).
        seed: of the samples.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    num_samples: int = 1
    seed: int = 0


def open_policy(source: str, dtype: str = "bf16") -> Policy:
    """A transformers folder, that of a PEFT adapter (its base comes along) or of a trainer's run, or ``smollm2``.

    Raises:
        FileNotFoundError: no such model folder.
    """
    folder = model_folder(source, dtype)
    revision = folder_revision(folder)
    from rlhfscale.models import loading
    from rlhfscale.samplers import hf

    base, adapter = folder, folder / "adapter_config.json"
    if adapter.is_file():
        base = Path(json.loads(adapter.read_text())["base_model_name_or_path"])
    model = loading.load_base(str(base), dtype)
    if adapter.is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    from transformers import AutoTokenizer

    with_tokenizer = folder if (folder / "tokenizer.json").is_file() else base
    tokenizer = AutoTokenizer.from_pretrained(with_tokenizer, local_files_only=True)
    context = getattr(model.config, "max_position_embeddings", None)
    name = source if source == SMOLLM2 else folder.resolve().name
    return Policy(functools.partial(hf.sample, model, batch_size=32), tokenizer, context, model, name, revision)


def model_folder(source: str, dtype: str = "bf16") -> Path:
    """The folder that a name stands for. Raises FileNotFoundError where there is none."""
    if source == SMOLLM2:
        from rlhfscale.models import smollm2

        return smollm2.prepare(paths.store_root() / "models", "fp32" if dtype == "fp32" else "bf16")
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such model folder")
    trained = folder / "checkpoint" / "policy"  # of a trainer's run
    return trained if trained.is_dir() and not (folder / "config.json").is_file() else folder


def open_judge(
    text: str,
    *,
    url: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    revision: str | None = None,
    dtype: str = "bf16",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    **options: Any,
) -> Judge | None:
    """The judge that a name such as ``endpoint:gpt-4-1106-preview`` or ``hf:FOLDER`` stands for; None for ``verifier``.

    Args:
        url: of an endpoint; default $OPENAI_BASE_URL.
        key_variable: environment variable that holds the key; a local server needs none.
        revision: of an endpoint's model, for the cache; of a local one it is computed.
        tensor_parallel, pipeline_parallel: of a vllm judge, see `samplers.vllm.VLLM`.
        options: of `endpoint.Endpoint`.

    Raises:
        ValueError: another kind of judge, an endpoint without an address.
        samplers.vllm.NotInstalled, EngineDied: of a vllm judge.
    """
    kind, _, source = text.partition(":")
    if text == "verifier":
        return None
    if kind not in ("endpoint", "hf", "vllm", "reward") or not source:
        raise ValueError(f"judge: {text!r} is none of {JUDGES}")
    if kind != "vllm" and (tensor_parallel, pipeline_parallel) != (1, 1):
        raise ValueError(f"tensor-parallel, pipeline-parallel: for judges of vllm: only, not {text}")
    if kind == "endpoint":
        url = url or os.environ.get("OPENAI_BASE_URL")
        if not url:
            raise ValueError("judge: an endpoint needs an address: --judge-url, or the variable OPENAI_BASE_URL")
        key = os.environ.get(key_variable) or "none"
        return Endpoint(source, url, api_key=key, revision=revision or "", **options)
    if kind == "hf":
        policy = open_policy(source, dtype)
        about = {"name": policy.name, "revision": policy.revision, "model": policy.model, "context": policy.context}
        return Local(policy.sample, policy.tokenizer, **about)
    folder = model_folder(source, dtype)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    about = {"name": source if source == SMOLLM2 else folder.resolve().name, "revision": folder_revision(folder)}
    if kind == "reward":
        from rlhfscale.rewards import OutcomeRewardModel

        return reward_judge(OutcomeRewardModel.load(folder), tokenizer, **about)
    from rlhfscale.samplers.vllm import VLLM

    engine = VLLM(folder, dtype=dtype, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    return Local(engine.sample, tokenizer, batch_size=256, context=engine.context, **about)


def answers_of(policy: Policy, turns: Sequence[Sequence[str]], decoding: Decoding, cache: Path) -> list[list[str]]:
    """The policy's answers, from the cache where the same were made before."""
    about = {
        "policy": policy.revision,
        "turns": [list(messages) for messages in turns],
        **{name: getattr(decoding, name) for name in ("max_new_tokens", "temperature", "seed")},
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = cache / f"{policy.name}-{key}.json"
    if path.is_file():
        return json.loads(path.read_text())["answers"]
    settings = {name: about[name] for name in ("max_new_tokens", "temperature", "seed")}
    found = benchmarks.answer(turns, policy.sample, policy.tokenizer, context=policy.context, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(about | {"answers": found}, indent=1) + "\n").encode())
    return found


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        judgments: one row for each verdict, by part: ``scores``, ``pairs``, ``preferences``, ``games`` or ``grades``.
        summary: estimates with intervals and the number of missing verdicts.
        answers: question ids, the user's messages and the policy's answers.
    """

    judgments: dict[str, pd.DataFrame]
    summary: pd.DataFrame
    answers: list[dict[str, Any]]


def evaluate(
    policy: Policy,
    benchmark: str,
    ask: Ask | None,
    *,
    decoding: Decoding,
    baseline: Policy | None = None,
    data: Path | None = None,
    revision: str | None = None,
    num_questions: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Put a policy before a benchmark.

    Args:
        ask: the judge; None for gsm8k and math, whose verifier decides.
        baseline: MT-Bench: compare in pairs with this policy too.
        data: folder with the benchmark's files; revision: of the hub's (see `sources`).
        num_questions: the first of each category (MT-Bench), or of all; None takes every question.
        seed: of the order in which AlpacaEval's judge sees the answers.

    Raises:
        ValueError: an unknown benchmark, or a judge or baseline that it does not take.
    """
    if benchmark not in benchmarks.BENCHMARKS:
        raise ValueError(f"benchmark: {benchmark!r} is none of {', '.join(benchmarks.BENCHMARKS)}")
    verified = benchmark in benchmarks.SOLVE
    if (ask is None) != verified:
        raise ValueError(f"judge: {benchmark} {'is decided by its verifier' if verified else 'needs a judge'}")
    if baseline is not None and benchmark != "mt_bench":
        raise ValueError(f"baseline: {benchmark} has a baseline of its own, or none")
    if verified:
        return _solved(policy, benchmark, decoding, data, num_questions)
    if benchmark == "mt_bench":
        return _mt_bench(policy, baseline, ask, decoding, data, num_questions)
    return _chats(policy, benchmark, ask, decoding, data, revision, num_questions, seed)


def _mt_bench(
    policy: Policy,
    baseline: Policy | None,
    ask: Ask,
    decoding: Decoding,
    data: Path | None,
    num_questions: int | None,
) -> Evaluation:
    """MT-Bench: scores of each turn, and comparisons in pairs with a baseline."""
    rng, about = np.random.default_rng(BOOTSTRAP_SEED), {"policy": policy.name}
    questions = subset(sources.mt_bench_questions(data), num_questions)
    prompts = sources.mt_bench_prompts(data)
    turns, ids = [question.turns for question in questions], [question.question_id for question in questions]
    given = answers_of(policy, turns, decoding, kept_answers())
    found, tables = {}, []
    if not ask.judge.scores:
        found["scores"] = mt_judged.mt_single(questions, prompts, given, ask)
        tables.append(mt_judged.mt_summary(found["scores"], rng, **about))
    if baseline is not None:
        other = answers_of(baseline, turns, decoding, kept_answers())
        found["pairs"] = mt_judged.mt_pairs(questions, prompts, given, other, ask)
        tables.append(mt_judged.mt_pair_summary(found["pairs"], rng, **about))
    if not tables:
        raise ValueError("judge: one that gives scores takes MT-Bench in pairs only: give --baseline")
    return Evaluation(found, pd.concat(tables, ignore_index=True), _shown(ids, turns, given))


def _chats(
    policy: Policy,
    benchmark: str,
    ask: Ask,
    decoding: Decoding,
    data: Path | None,
    revision: str | None,
    num_questions: int | None,
    seed: int,
) -> Evaluation:
    """AlpacaEval and Arena-Hard: one answer to each instruction, against the benchmark's own baseline."""
    rng, about = np.random.default_rng(BOOTSTRAP_SEED), {"policy": policy.name}
    chats, template = getattr(sources, benchmark)(data, revision)
    chats = chats[:num_questions]
    turns, ids = [[chat.instruction] for chat in chats], [chat.question_id for chat in chats]
    given = answers_of(policy, turns, decoding, kept_answers())
    texts = [first for (first,) in given]
    if benchmark == "alpaca_eval":
        table = benchmarks.alpaca(chats, template, texts, ask, seed=seed)
        summary = benchmarks.alpaca_summary(table, rng, *_length_control(data, revision, len(chats)), **about)
        return Evaluation({"preferences": table}, summary, _shown(ids, turns, given))
    version = "v2.0" if any(chat.category for chat in chats) else "v0.1"
    table = benchmarks.arena(chats, template, texts, ask, model=policy.name, version=version)
    summary = benchmarks.arena_summary(table, rng, version, **about)
    return Evaluation({"games": table}, summary, _shown(ids, turns, given))


def _solved(
    policy: Policy, benchmark: str, decoding: Decoding, data: Path | None, num_questions: int | None
) -> Evaluation:
    """GSM8K and MATH: several answers to each problem, graded by the verifier."""
    problems = sources.problems(benchmark, data)[:num_questions]
    turns = [[benchmarks.SOLVE[benchmark].format(question=problem.question)] for problem in problems]
    repeated = [messages for messages in turns for _ in range(decoding.num_samples)]
    flat = answers_of(policy, repeated, decoding, kept_answers())
    samples = [
        [text for (text,) in flat[start : start + decoding.num_samples]]
        for start in range(0, len(flat), decoding.num_samples)
    ]
    table = benchmarks.graded(benchmark, problems, samples)
    ids = [problem.question_id for problem in problems]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    summary = benchmarks.graded_summary(benchmark, table, rng, policy=policy.name)
    return Evaluation({"grades": table}, summary, _shown(ids, turns, samples))


def kept_answers() -> Path:
    """Where answers are kept, so that an interrupted evaluation goes on."""
    return paths.store_root() / "answers"


def subset(questions: Sequence[Any], num_questions: int | None) -> list[Any]:
    """The first questions of each category in turn, in their own order: a subset that has all categories."""
    if num_questions is None or num_questions >= len(questions):
        return list(questions)
    by_category: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        by_category.setdefault(question.category, []).append(place)
    ranked = sorted(
        (rank, order, place) for order, places in enumerate(by_category.values()) for rank, place in enumerate(places)
    )
    return [questions[place] for place in sorted(place for _, _, place in ranked[:num_questions])]


def _length_control(
    data: Path | None, revision: str | None, count: int
) -> tuple[np.ndarray | None, logistic.Rows | None]:
    """The authors' difficulties and gamed rows, where they are; (None, None) where not."""
    try:
        paths_of = [
            sources.locate("alpaca_eval", name, data, revision)
            for name in ("instruction_difficulty.csv", "df_gamed.csv")
        ]
    except FileNotFoundError:
        return None, None
    difficulty, gamed = (pd.read_csv(path) for path in paths_of)
    columns = (gamed[name].to_numpy() for name in ("preference", "std_delta_len", "instruction_difficulty"))
    return difficulty["instruction_difficulty"].to_numpy()[:count], alpaca_eval.gamed_rows(*columns)


def _shown(
    ids: Sequence[Any], turns: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    rows = zip(ids, turns, answers, strict=True)
    return [{"question_id": name, "turns": list(asked), "answers": list(given)} for name, asked, given in rows]


def save(found: Evaluation, folder: Path, manifest: dict[str, Any]) -> Path:
    """Write answers.jsonl, a CSV for each table and manifest.json."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in found.answers)
    replace_file(folder / "answers.jsonl", lines.encode())
    for name, table in {**found.judgments, "summary": found.summary}.items():
        replace_file(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g").encode())
    replace_file(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return folder


def cache_of_judgments() -> Cache:
    """Where replies are kept: below the store."""
    return Cache(paths.store_root() / "judge")
