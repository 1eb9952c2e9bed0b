"""The whole pipeline on a published language model: chat model, fine-tuning, reward model, PPO, best-of-N.

The model answers questions of the reasoning-gym library, whose verifiers say which answers are right.
"""

from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

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
from rlhfscale.study.artifacts import Folders, read_responses, read_scores
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.tables import Tables, command, mean_intervals, per_prompt_table

if TYPE_CHECKING:
    from rlhfscale.chat.answers import Answers

Run = Literal["score-lora", "mixed-lora", "score-qlora", "mixed-qlora"]
"""A PPO run. Its reward is the reward model's score alone (``score``), or the verifier's verdict too (``mixed``). Its
base model is held in bfloat16 (``lora``) or in 4 bits (``qlora``)."""
BEFORE = "chat", "tuned"
"""The stages before PPO. Each PPO run is a further stage."""
KINDS = "sampled", "greedy"
"""The two ways in which every stage answers the held-out questions."""
Cell = tuple[str, int, str]
"""Stage, seed and kind of some answers."""
SCORE_WEIGHT, VERIFIER_WEIGHT = 0.5, 2.0
"""Reward of mixed runs: for a standard deviation of the score, and for a right answer."""
ON_CPU = {
    "ladder": "checkpoints", "precision": None, "chat_tokens": 32, "max_new_tokens": 12,
    "rejection_samples": 4, "rejection_temperature": 0.7, "sft_epochs": 2, "sft_batch": 16, "sft_lr": 5e-4,
    "label_samples": 8, "reward_epochs": 2, "reward_batch": 8, "reward_lr": 3e-4,
    "ppo_prompts": 16, "ppo_responses": 8, "ppo_epochs": 2, "ppo_critic_lr": 1e-3, "ppo_value_coefficient": 0.1,
    "ppo_eos_penalty": 1.0, "grpo_policy_lr": 1e-4, "grpo_kl": 0.05, "rloo_policy_lr": 1e-4, "rloo_kl": 0.05,
    "lora_rank": 16, "lora_alpha": 32.0,
}  # fmt: skip
"""The recipe of the tiers laptop and smoke, whose own recipes are for models that are trained from scratch. All other
tiers use their own. The learning rates were chosen with seed 0, which no figure uses. Meanings: `chat.recipe`."""


class Params(StudyFigure):
    """The pipeline on a published chat model: rejection sampling, fine-tuning, reward model, PPO."""

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
        """The tier's recipe with this figure's checkpoint, tasks and sizes."""
        recipe = recipes.load(self.recipe)
        fixed = recipe.model_dump() if isinstance(recipe, CheckpointRecipe) else ON_CPU
        num_questions = self.num_questions * len(self.tasks)
        own = {
            "tasks": self.tasks,
            "label_rungs": (self.checkpoint,),
            "rejection_prompts": num_questions,
            "reward_prompts": num_questions,
            "ppo_updates": self.updates,
            "ppo_policy_lr": self.policy_lr,
            "ppo_kl": self.kl_coefficient,
            "eval_prompts": self.eval_prompts * len(self.tasks),
            "eval_samples": self.eval_samples,
        }
        return CheckpointRecipe(**fixed | own)

    @property
    def best_of(self) -> tuple[int, ...]:
        """Values of N for best-of-N: powers of two up to `eval_samples`."""
        return tuple(2**power for power in range(self.eval_samples.bit_length()))

    @property
    def stages(self) -> tuple[str, ...]:
        """Every stage, in the order of the pipeline."""
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
        """Return sampled answers to the held-out questions. Questions and the chat model are the same for all seeds."""
        seed = self.seeds[0] if stage == "chat" else seed
        return self.settings.evaluation(self.model(stage, seed), seed)

    def greedy(self, stage: str, seed: int) -> chat_specs.Answers:
        return self.evaluation(stage, seed).changed(num_samples=1, temperature=0.0)

    def answers(self) -> dict[Cell, chat_specs.Answers]:
        """Return the answers of every stage, seed and kind (sampled or greedy)."""
        ways = dict(zip(KINDS, (self.evaluation, self.greedy), strict=True))
        cells = product(self.stages, self.seeds, KINDS)
        return {(stage, seed, kind): ways[kind](stage, seed) for stage, seed, kind in cells}

    def scores(self, seed: int) -> chat_specs.AnswerScores:
        return self.settings.scores(self.evaluation("tuned", seed), self.reward_model(seed))

    def specs(self) -> tuple[Spec, ...]:
        trained = [self.model(stage, seed) for stage, seed in product(self.stages[1:], self.seeds)]
        rewards = [spec for seed in self.seeds for spec in (self.scores(seed), self.reward_model(seed))]
        return tuple(dict.fromkeys([*self.answers().values(), *trained, *rewards]))


def measure(P: Params, made: Folders) -> Tables:
    """Return accuracy by stage and task, gains of PPO over the fine-tuned model, best-of-N, and pair accuracy.

    An answer is right if the last number in it is right (`chat.reasoning.grade`). Intervals resample seeds and held-out
    questions together, and differences between stages are paired. The further tables are training.csv (every PPO
    update) and answers.csv (some questions with the answers of every stage).
    """
    found = {cell: read_responses(made, spec) for cell, spec in P.answers().items()}
    of_task = found["chat", P.seeds[0], "sampled"].tasks
    summary = []
    for kind in KINDS:
        right = np.array([[found[stage, seed, kind].right.mean(1) for seed in P.seeds] for stage in P.stages])
        for task in (*P.tasks, "all"):
            accuracy = right[:, :, of_task == task] if task != "all" else right
            gain = accuracy[2:] - accuracy[1]
            for name, stages, values in (("accuracy", P.stages, accuracy), ("gain", P.ppo, gain)):
                for stage, part in zip(stages, mean_intervals(values).split(), strict=True):
                    summary.append(summary_row(f"{kind}_{name}", part, stage=stage, task=task))
    right = np.array([found["tuned", seed, "sampled"].right for seed in P.seeds], float)
    scores = np.array([read_scores(made, P.scores(seed)) for seed in P.seeds])
    curve = np.moveaxis(best_of_n(right, scores, list(P.best_of)), -1, 0)
    for size, part in zip(P.best_of, mean_intervals(curve).split(), strict=True):
        summary.append(summary_row("best_of_n", part, num_responses=size, stage="tuned", task="all"))
    runs, prompts = _runs(P, made, found, of_task)
    extra = {"training.csv": training(P, made), "answers.csv": reading(P, made, found)}
    return Tables(runs, pd.DataFrame(summary), prompts, extra=extra)


def _runs(P: Params, made: Folders, found: dict[Cell, "Answers"], of_task: np.ndarray) -> tuple[pd.DataFrame, ...]:
    """The tables of runs and of values by prompt."""
    rows, prompts = [], []
    for (stage, seed, kind), spec in P.answers().items():
        answers = found[stage, seed, kind]
        values = {
            f"{kind}_accuracy": answers.right,
            f"{kind}_bare": answers.bare,
            f"{kind}_finished": answers.finished,
            f"{kind}_response_tokens": answers.lengths,
        }
        for task in P.tasks:
            chosen = answers.tasks == task
            about = {"node": spec.key, "stage": stage, "task": task, "seed": seed, "num_prompts": int(chosen.sum())}
            rows += [about | {"metric": name, "value": float(of[chosen].mean())} for name, of in values.items()]
        table = per_prompt_table(spec, seed, f"{kind}_accuracy", answers.right.mean(1))
        prompts.append(table.assign(stage=stage, task=answers.tasks))
    for seed in P.seeds:
        spec = P.reward_model(seed)
        accuracy = load_file(made[spec] / "held_out.safetensors")["pair_accuracy"]
        for task in P.tasks:
            known = accuracy[(of_task == task) & ~np.isnan(accuracy)]
            if len(known):
                about = {"node": spec.key, "stage": "reward_model", "task": task, "seed": seed}
                about |= {"num_prompts": len(known), "metric": "pair_accuracy", "value": float(known.mean())}
                rows.append(about)
    common = {"figure": P.figure, "command": command(P), "rung": P.checkpoint, "num_params": num_params(P.checkpoint)}
    return pd.DataFrame([common | row for row in rows]), pd.concat(prompts)


def training(P: Params, made: Folders) -> pd.DataFrame:
    """Return every update of every PPO run: the trainer's metrics and ``right``, the share of right roll-outs."""
    runs = [
        pd.read_csv(made[P.aligned(run, seed)] / "metrics.csv").assign(stage=run, seed=seed)
        for run, seed in product(P.ppo, P.seeds)
    ]
    return pd.concat(runs, ignore_index=True)


def reading(P: Params, made: Folders, found: dict[Cell, "Answers"]) -> pd.DataFrame:
    """Return the first three held-out questions of each task, with the greedy answers of every stage for one seed."""
    from transformers import AutoTokenizer  # it imports torch

    seed = P.seeds[0]
    tokenizer = AutoTokenizer.from_pretrained(made[P.tuned(seed)] / "model", local_files_only=True)
    questions = found["chat", seed, "greedy"].questions
    table = pd.DataFrame(
        [{"task": asked.task, "question": asked.text, "right_answer": asked.answer} for asked in questions]
    )
    for stage in P.stages:
        table[stage] = found[stage, seed, "greedy"].texts(tokenizer)[:, 0]
    return pd.concat([table[table["task"] == task].head(3) for task in P.tasks], ignore_index=True)


REAL_STAGES = {
    "chat": ("chat model", style.CATEGORIES[7]),
    "tuned": ("fine-tuned", style.CATEGORIES[1]),
    "score-lora": ("PPO by score, LoRA", style.CATEGORIES[3]),
    "score-qlora": ("PPO by score, QLoRA", style.CATEGORIES[4]),
    "mixed-lora": ("PPO by score and verifier, LoRA", style.CATEGORIES[0]),
    "mixed-qlora": ("PPO by score and verifier, QLoRA", style.CATEGORIES[2]),
}
"""Label and colour of each stage."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """Draw accuracy by task and stage, PPO's roll-outs update by update, and response lengths.

    Args:
        runs: ``stage``, ``task``, ``seed``, ``metric``, ``value``; metrics ``sampled_accuracy`` and
            ``sampled_response_tokens``.
        summary: the common columns, ``stage`` and ``task``; quantity ``sampled_accuracy``.
        training: ``stage``, ``seed``, ``update`` and ``right``, the share of right roll-outs.
    """
    estimates = style.select(summary, "sampled_accuracy")
    stages = [name for name in REAL_STAGES if name in set(estimates["stage"])]
    tasks = sorted(set(estimates["task"]), key=lambda task: (task == "all", task))
    caption = style.interval_caption(summary, "dots: seeds; bars: ")
    caption += " A response is right if the last number in it is."
    figure, axes, legend = style.new_figure(2, 2, 4.6, caption)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top, left, right = figure.add_subplot(grid[0, :]), axes[1, 0], axes[1, 1]
    handles = []
    for number, stage in enumerate(stages):
        label, color = REAL_STAGES[stage]
        handles.append(Line2D([], [], color=color, marker="o", linestyle="none", label=label))
        place = {task: spot + 0.16 * (number - (len(stages) - 1) / 2) for spot, task in enumerate(tasks)}
        bars, of_stage = estimates[estimates["stage"] == stage], runs[runs["stage"] == stage]
        dots = of_stage[of_stage["metric"] == "sampled_accuracy"]
        look = {"color": color, "marker": "o", "linestyle": "none"}
        style.draw_estimates(top, bars.assign(x=bars["task"].map(place)), "x", **look)
        style.draw_dots(top, dots.assign(x=dots["task"].map(place)), "x", color)
        lengths = of_stage[of_stage["metric"] == "sampled_response_tokens"].groupby("seed")["value"].mean()
        right.bar(number, lengths.mean(), color=color, alpha=0.6, width=0.6)
        right.scatter([number] * len(lengths), lengths, s=7, color="0.2", zorder=3)
        for _, run in training[training["stage"] == stage].groupby("seed"):
            left.plot(run["update"] + 1, run["right"].rolling(3, min_periods=1).mean(), color=color, linewidth=1)
    top.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    top.set(title="accuracy on held-out questions, sampled at temperature 1", ylabel="share right")
    left.set(title="PPO's roll-outs, every seed", xlabel="update (mean of three)", ylabel="share right")
    right.set(title="length of responses", ylabel="tokens")
    right.set_xticks([])
    legend(handles, ncols=3)
    return figure
