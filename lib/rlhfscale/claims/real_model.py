"""The whole pipeline on a published language model: chat model, fine-tuning, reward model, PPO, best-of-N.

The model answers questions of reasoning-gym, whose verifier says which answers are right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator
from safetensors.numpy import load_file

from rlhfscale.chat import specs as chat_specs
from rlhfscale.chat.recipe import LABELS, CheckpointRecipe
from rlhfscale.evals.best_of_n import best_of_n
from rlhfscale.models.checkpoints import checkpoint
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import summary_row
from rlhfscale.study import recipes, style
from rlhfscale.study.artifacts import read_responses
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.tables import Tables, command, mean_intervals, per_prompt_table

Run = Literal["score-lora", "mixed-lora", "score-qlora", "mixed-qlora"]
"""A PPO run: whether the reward model's score alone rewards it or the verifier too, and whether its base is in bfloat16
(LoRA) or in 4 bits (QLoRA)."""
BEFORE = "chat", "tuned"
"""Stages before PPO; each run of PPO is a further one."""
SCORE_WEIGHT, VERIFIER_WEIGHT = 0.5, 2.0
"""Of mixed runs: the reward of a standard deviation of the score, and of a right answer."""
ON_CPU = {
    "ladder": "checkpoints",
    "precision": None,
    "chat_tokens": 32,
    "max_new_tokens": 12,
    "rejection_samples": 4,
    "rejection_temperature": 0.7,
    "sft_epochs": 2,
    "sft_batch": 16,
    "sft_lr": 5e-4,
    "label_samples": 8,
    "reward_epochs": 2,
    "reward_batch": 8,
    "reward_lr": 3e-4,
    "ppo_prompts": 16,
    "ppo_responses": 8,
    "ppo_epochs": 2,
    "ppo_critic_lr": 1e-3,
    "ppo_value_coefficient": 0.1,
    "ppo_eos_penalty": 1.0,
    "grpo_policy_lr": 1e-4,
    "grpo_kl": 0.05,
    "rloo_policy_lr": 1e-4,
    "rloo_kl": 0.05,
    "lora_rank": 16,
    "lora_alpha": 32.0,
}
"""What the figure holds fixed in tiers whose own ladder is trained from scratch; the rates were chosen with seed 0,
which is in no figure. In tiers of published checkpoints it is made with their recipe."""


class Params(StudyFigure):
    """The whole pipeline on a published chat model: rejection sampling, fine-tuning, reward model, PPO."""

    figure: ClassVar[str] = "20_real_model"
    title: ClassVar[str] = "The pipeline on a published language model"
    claims: ClassVar[tuple[str, ...]] = ()

    checkpoint: str = field(role="fixed", doc="published chat model, see rlhfscale.models.checkpoints")
    tasks: tuple[str, ...] = field(role="fixed", min_length=1, doc="reasoning-gym tasks, see tasks.reasoning")
    ppo: tuple[Run, ...] = field(
        role="scientific", min_length=1, doc="PPO by the score, or by score and verifier; with LoRA or QLoRA"
    )
    num_questions: int = field(role="fixed", ge=1, doc="questions of each task, for rejection sampling and for labels")
    updates: int = field(role="fixed", ge=1, doc="PPO updates")
    policy_lr: float = field(role="nuisance", gt=0, doc="AdamW rate of the policy's adapter in PPO")
    kl_coefficient: float = field(role="nuisance", ge=0, doc="standard deviations of the score for a nat")
    eval_prompts: int = field(role="fixed", ge=2, doc="held-out questions of each task")
    eval_samples: int = field(role="fixed", ge=2, doc="sampled responses to each")

    @model_validator(mode="after")
    def _check(self) -> Self:
        checkpoint(self.checkpoint)
        return self

    @property
    def settings(self) -> CheckpointRecipe:
        """The tier's recipe, with one rung and what the figure's own parameters say."""
        recipe = recipes.load(self.recipe)
        fixed = recipe.model_dump() if isinstance(recipe, CheckpointRecipe) else ON_CPU
        own = {
            "tasks": self.tasks,
            "label_rungs": (self.checkpoint,),
            "rejection_prompts": self.num_questions * len(self.tasks),
            "reward_prompts": self.num_questions * len(self.tasks),
            "ppo_updates": self.updates,
            "ppo_policy_lr": self.policy_lr,
            "ppo_kl": self.kl_coefficient,
            "eval_prompts": self.eval_prompts * len(self.tasks),
            "eval_samples": self.eval_samples,
        }
        return CheckpointRecipe(**fixed | own)

    @property
    def best_of(self) -> tuple[int, ...]:
        """Values of N: powers of two up to eval_samples."""
        return tuple(2**power for power in range(self.eval_samples.bit_length()))

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order of the pipeline."""
        return (*BEFORE, *self.ppo)

    def tuned(self, seed: int) -> chat_specs.Tuned:
        return self.settings.sft(self.checkpoint, seed)

    def reward_model(self, seed: int) -> chat_specs.AnswerReward:
        recipe, tuned = self.settings, self.tuned(seed)
        data = recipe.answers(tuned, "train", self.num_questions, recipe.label_samples, 10 * seed + LABELS, seed)
        return recipe.reward_model_of(tuned, (data,), (self.evaluation("tuned", seed),), seed)

    def aligned(self, run: Run, seed: int) -> chat_specs.Aligned:
        reward, _, adapter = run.partition("-")
        mixed = {"score_weight": SCORE_WEIGHT, "verifier_weight": VERIFIER_WEIGHT}
        return self.settings.policy_of(self.tuned(seed), self.reward_model(seed), seed).changed(
            **(mixed if reward == "mixed" else {}), precision="nf4" if adapter == "qlora" else "bf16"
        )

    def model(self, stage: str, seed: int) -> chat_specs.Chat | chat_specs.Tuned | chat_specs.Aligned:
        if stage == "chat":
            return self.settings.chat(self.checkpoint)
        return self.tuned(seed) if stage == "tuned" else self.aligned(cast(Run, stage), seed)

    def evaluation(self, stage: str, seed: int) -> chat_specs.Answers:
        """Sampled answers to the held-out questions, which are the same for every seed; so are the chat model's."""
        seed = self.seeds[0] if stage == "chat" else seed
        return self.settings.evaluation(self.model(stage, seed), seed)

    def greedy(self, stage: str, seed: int) -> chat_specs.Answers:
        return self.evaluation(stage, seed).changed(num_samples=1, temperature=0.0)

    def scores(self, seed: int) -> chat_specs.AnswerScores:
        return self.settings.scores(self.evaluation("tuned", seed), self.reward_model(seed))

    def specs(self) -> tuple[Spec, ...]:
        found: list[Spec] = []
        for seed in self.seeds:
            for stage in self.stages:
                found += [self.evaluation(stage, seed), self.greedy(stage, seed)]
            found.append(self.scores(seed))
        aligned = [self.aligned(run, seed) for seed in self.seeds for run in self.ppo]
        rewards = [spec for seed in self.seeds for spec in (self.tuned(seed), self.reward_model(seed))]
        return tuple(dict.fromkeys([*found, *aligned, *rewards]))


def measure(P: Params, folders: Mapping[Spec, Path]) -> Tables:
    """Accuracy by stage and task, gains of PPO over the tuned model, best-of-N, and the reward model's accuracy.

    Accuracies are by the last number of a response (`tasks.reasoning.grade`); intervals resample seeds and held-out
    questions together, paired between stages.
    """
    found = {
        (stage, seed, kind): read_responses(folders, spec)
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


def training(P: Params, folders: Mapping[Spec, Path]) -> pd.DataFrame:
    """Every update of every PPO run: the trainer's metrics and ``right``, the share of right roll-outs."""
    runs = [
        pd.read_csv(folders[P.aligned(run, seed)] / "metrics.csv").assign(stage=run, seed=seed)
        for run in P.ppo
        for seed in P.seeds
    ]
    return pd.concat(runs, ignore_index=True)


def reading(P: Params, folders: Mapping[Spec, Path], found: dict, per_task: int = 3) -> pd.DataFrame:
    """Some held-out questions and the greedy answers of every stage, first seed: not chosen, the first of each task."""
    seed = P.seeds[0]
    from transformers import AutoTokenizer  # it imports torch

    tokenizer = AutoTokenizer.from_pretrained(folders[P.tuned(seed)] / "model", local_files_only=True)
    texts = {stage: found[stage, seed, "greedy"].texts(tokenizer)[:, 0] for stage in P.stages}
    questions = found["chat", seed, "greedy"].questions
    rows = []
    for task in P.tasks:
        for row in [i for i, question in enumerate(questions) if question.task == task][:per_task]:
            about = {"task": task, "question": questions[row].text, "right_answer": questions[row].answer}
            rows.append(about | {stage: texts[stage][row] for stage in P.stages})
    return pd.DataFrame(rows)


def _runs(P: Params, folders: Mapping[Spec, Path], found: dict) -> pd.DataFrame:
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


def _best_of_n(P: Params, folders: Mapping[Spec, Path], found: dict) -> list[dict[str, Any]]:
    right = np.array([found["tuned", seed, "sampled"].right for seed in P.seeds], float)
    scores = np.array([load_file(folders[P.scores(seed)] / "scores.safetensors")["scores"] for seed in P.seeds])
    curve = np.moveaxis(best_of_n(right, scores, list(P.best_of)), -1, 0)
    best = zip(P.best_of, mean_intervals(curve).split(), strict=True)
    return [summary_row("best_of_n", part, num_responses=size, stage="tuned", task="all") for size, part in best]


def _all_prompts(P: Params, found: dict) -> pd.DataFrame:
    parts = []
    for (stage, seed, kind), answers in found.items():
        spec = P.evaluation(stage, seed) if kind == "sampled" else P.greedy(stage, seed)
        values = per_prompt_table(spec, seed, f"{kind}_accuracy", answers.right.mean(1))
        parts.append(values.assign(stage=stage, task=answers.tasks))
    return pd.concat(parts)


REAL_STAGES = {
    "chat": ("chat model", style.CATEGORIES[7]),
    "tuned": ("fine-tuned", style.CATEGORIES[1]),
    "score-lora": ("PPO by score, LoRA", style.CATEGORIES[3]),
    "score-qlora": ("PPO by score, QLoRA", style.CATEGORIES[4]),
    "mixed-lora": ("PPO by score and verifier, LoRA", style.CATEGORIES[0]),
    "mixed-qlora": ("PPO by score and verifier, QLoRA", style.CATEGORIES[2]),
}
"""Label and colour of each stage of the pipeline on a published model."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """Accuracy by task and stage, PPO's roll-outs update by update, and response lengths.

    Args:
        runs: ``stage``, ``task``, ``seed``, ``metric``, ``value``; metrics ``sampled_accuracy`` and
            ``sampled_response_tokens``.
        summary: the common columns, ``stage`` and ``task``; quantity ``sampled_accuracy``.
        training: ``stage``, ``seed``, ``update`` and ``right``, the share of right roll-outs.
    """
    rows = style.select(summary, "sampled_accuracy")
    stages = [name for name in REAL_STAGES if name in set(rows["stage"])]
    tasks = sorted(set(rows["task"]), key=lambda task: (task == "all", task))
    caption = (
        style.interval_caption(summary, "dots: seeds; bars: ") + " A response is right if the last number in it is."
    )
    figure, axes, legend = style.new_figure(2, 2, 4.6, caption)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top, left, right = figure.add_subplot(grid[0, :]), axes[1, 0], axes[1, 1]
    for number, stage in enumerate(stages):
        color = REAL_STAGES[stage][1]
        shift = 0.16 * (number - (len(stages) - 1) / 2)
        for place, task in enumerate(tasks):
            at = {"x": place + shift}
            style.draw_estimates(top, style.select(rows, "sampled_accuracy", stage=stage, task=task).assign(**at), "x",
                       color=color, marker="o", linestyle="none")  # fmt: skip
            of = runs[(runs["metric"] == "sampled_accuracy") & (runs["stage"] == stage) & (runs["task"] == task)]
            if len(of):
                style.draw_dots(top, of.assign(**at), "x", color)
        lengths = runs[(runs["metric"] == "sampled_response_tokens") & (runs["stage"] == stage)]
        lengths = lengths.groupby("seed", as_index=False)["value"].mean().assign(x=number)
        right.bar(number, lengths["value"].mean(), color=color, alpha=0.6, width=0.6)
        right.scatter(lengths["x"], lengths["value"], s=7, color="0.2", zorder=3)
        for _, run in training[training["stage"] == stage].groupby("seed"):
            left.plot(run["update"] + 1, run["right"].rolling(3, min_periods=1).mean(), color=color, linewidth=1)
    top.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    top.set(title="accuracy on held-out questions, sampled at temperature 1", ylabel="share right")
    left.set(title="PPO's roll-outs, every seed", xlabel="update (mean of three)", ylabel="share right")
    right.set(title="length of responses", ylabel="tokens")
    right.set_xticks([])
    legend([Line2D([], [], color=REAL_STAGES[s][1], marker="o", linestyle="none", label=REAL_STAGES[s][0])
            for s in stages], ncols=3)  # fmt: skip
    return figure
