"""From artifacts to tidy tables, for the figure on a pretrained language model (see `real_model`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from rlhfscale.chat.answers import Answers
from rlhfscale.chat.checkpoints import checkpoint
from rlhfscale.evals.best_of_n import best_of_n
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import summary_row
from rlhfscale.study.real_model import RealModel
from rlhfscale.study.tables import Tables, command, mean_intervals, per_prompt_table


def tables(P: RealModel, folders: Mapping[Spec, Path]) -> Tables:
    """Accuracy by stage and task, gains of PPO over the tuned model, best-of-N, and the reward model's accuracy.

    Accuracies are by the last number of a response (`tasks.reasoning.grade`); intervals resample seeds and held-out
    questions together, paired between stages.
    """
    found = {
        (stage, seed, kind): Answers.load(folders[spec])
        for stage in P.stages
        for seed in P.seeds
        for kind, spec in (("sampled", P.evaluation(stage, seed)), ("greedy", P.greedy(stage, seed)))
    }
    of_task = found["chat", P.seeds[0], "sampled"].tasks
    summary = []
    for kind in ("sampled", "greedy"):
        right = {s: np.array([found[s, seed, kind].right.mean(1) for seed in P.seeds]) for s in P.stages}
        for task in (*P.tasks, "all"):
            columns = np.ones(len(of_task), bool) if task == "all" else of_task == task
            accuracy = np.array([right[stage][:, columns] for stage in P.stages])
            for stage, part in zip(P.stages, mean_intervals(accuracy).split(), strict=True):
                summary.append(summary_row(f"{kind}_accuracy", part, stage=stage, task=task))
            for stage, part in zip(P.stages[2:], mean_intervals(accuracy[2:] - accuracy[1]).split(), strict=True):
                summary.append(summary_row(f"{kind}_gain", part, stage=stage, task=task))
    summary += _best_of_n(P, folders, found)
    return Tables(
        _runs(P, folders, found),
        pd.DataFrame(summary),
        _all_prompts(P, found),
        extra={"training.csv": training(P, folders), "answers.csv": reading(P, folders, found)},
    )


def training(P: RealModel, folders: Mapping[Spec, Path]) -> pd.DataFrame:
    """Every update of every PPO run: the trainer's metrics and ``right``, the share of right roll-outs."""
    runs = [
        pd.read_csv(folders[P.aligned(run, seed)] / "metrics.csv").assign(stage=run, seed=seed)
        for run in P.ppo
        for seed in P.seeds
    ]
    return pd.concat(runs, ignore_index=True)


def reading(P: RealModel, folders: Mapping[Spec, Path], found: dict, per_task: int = 3) -> pd.DataFrame:
    """Some held-out questions and the greedy answers of every stage, first seed: not chosen, the first of each task."""
    seed = P.seeds[0]
    tokenizer = AutoTokenizer.from_pretrained(folders[P.tuned(seed)] / "model", local_files_only=True)
    texts = {stage: found[stage, seed, "greedy"].texts(tokenizer)[:, 0] for stage in P.stages}
    questions = found["chat", seed, "greedy"].questions
    rows = []
    for task in P.tasks:
        for row in [i for i, question in enumerate(questions) if question.task == task][:per_task]:
            about = {"task": task, "question": questions[row].text, "right_answer": questions[row].answer}
            rows.append(about | {stage: texts[stage][row] for stage in P.stages})
    return pd.DataFrame(rows)


def _runs(P: RealModel, folders: Mapping[Spec, Path], found: dict) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    common = {"figure": P.figure, "command": command(P), "rung": P.checkpoint}
    common["num_params"] = checkpoint(P.checkpoint).num_params
    for (stage, seed, kind), answers in found.items():
        spec = P.evaluation(stage, seed) if kind == "sampled" else P.greedy(stage, seed)
        for task in P.tasks:
            of = answers.tasks == task
            values = {
                f"{kind}_accuracy": answers.right[of].mean(),
                f"{kind}_bare": answers.bare[of].mean(),
                f"{kind}_finished": answers.finished[of].mean(),
                f"{kind}_response_tokens": answers.lengths[of].mean(),
            }
            about = {"node": spec.key, "stage": stage, "task": task, "seed": seed, "num_prompts": int(of.sum())}
            rows += [common | about | {"metric": name, "value": float(value)} for name, value in values.items()]
    of_task = found["tuned", P.seeds[0], "sampled"].tasks
    for seed in P.seeds:
        spec = P.reward_model(seed)
        accuracy = load_file(folders[spec] / "held_out.safetensors")["pair_accuracy"]
        for task in P.tasks:
            mixed = accuracy[of_task == task]
            mixed = mixed[~np.isnan(mixed)]
            if len(mixed):
                about = {"node": spec.key, "stage": "reward_model", "task": task, "seed": seed}
                about |= {"metric": "pair_accuracy", "value": float(mixed.mean()), "num_prompts": len(mixed)}
                rows.append(common | about)
    return pd.DataFrame(rows)


def _best_of_n(P: RealModel, folders: Mapping[Spec, Path], found: dict) -> list[dict[str, Any]]:
    right = np.array([found["tuned", seed, "sampled"].right for seed in P.seeds], float)
    scores = np.array([load_file(folders[P.scores(seed)] / "scores.safetensors")["scores"] for seed in P.seeds])
    curve = np.moveaxis(best_of_n(right, scores, list(P.best_of)), -1, 0)
    best = zip(P.best_of, mean_intervals(curve).split(), strict=True)
    return [summary_row("best_of_n", part, num_responses=size, stage="tuned", task="all") for size, part in best]


def _all_prompts(P: RealModel, found: dict) -> pd.DataFrame:
    parts = []
    for (stage, seed, kind), answers in found.items():
        spec = P.evaluation(stage, seed) if kind == "sampled" else P.greedy(stage, seed)
        values = per_prompt_table(spec, seed, f"{kind}_accuracy", answers.right.mean(1))
        parts.append(values.assign(stage=stage, task=answers.tasks))
    return pd.concat(parts)
