"""Do more responses per prompt help policy training at first, and then plateau? (claim C5)

PPO is run with 1, 2, 4, ... responses to each prompt, at equal prompts and at equal roll-outs; GRPO at equal prompts.
The claim compares what the first doublings bring with what the last one brings.
"""

from typing import ClassVar, Literal, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, cost, new_rng

Ladder = Literal["ppo, equal prompts", "ppo, equal roll-outs", "grpo, equal prompts"]


class Params(OnePolicy):
    """C5: accuracy after PPO by responses per prompt, at equal prompts and at equal roll-outs; the same for GRPO."""

    figure: ClassVar[str] = "05_responses_per_prompt"
    title: ClassVar[str] = "More responses per prompt help at first and plateau quickly"
    claims: ClassVar[tuple[str, ...]] = ("C5",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    num_prompts: int = field(role="fixed", ge=1, doc="prompts in an update, in the ladders at equal prompts")
    responses: tuple[int, ...] = field(
        role="scientific", min_length=4, doc="PPO's responses per prompt at equal prompts: 1 and doublings of it"
    )
    grpo_responses: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="GRPO's at equal prompts: 2 and doublings of it"
    )
    rollouts: int = field(role="fixed", ge=2, doc="roll-outs in an update, in the ladder at equal roll-outs")
    rollout_responses: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="PPO's at equal roll-outs: 1 and doublings of it"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        for name, first in (("responses", 1), ("grpo_responses", 2), ("rollout_responses", 1)):
            sizes = getattr(self, name)
            if list(sizes) != [first * 2**power for power in range(len(sizes))]:
                raise ValueError(f"{name}: {list(sizes)} must be {first} and each doubling of it in turn")
        for size in sorted({*self.responses, *self.grpo_responses}):
            self._splits("num_prompts", self.num_prompts, size)
        for size in self.rollout_responses:
            if self.rollouts % size:
                raise ValueError(f"rollout_responses: {size} does not divide the {self.rollouts} roll-outs")
        self._splits("rollouts", self.rollouts, 1)
        return self

    def ladders(self) -> dict[Ladder, tuple[int, ...]]:
        """The responses per prompt of each ladder."""
        return {
            "ppo, equal prompts": self.responses,
            "ppo, equal roll-outs": self.rollout_responses,
            "grpo, equal prompts": self.grpo_responses,
        }

    def policy(self, name: Ladder, responses: int, seed: int) -> roles.Policy:
        algorithm, _, equal = name.partition(", equal ")
        prompts = self.num_prompts if equal == "prompts" else self.rollouts // responses
        about = {"algorithm": algorithm, "prompts": prompts, "responses": responses}
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed, **about)

    def policies(self) -> tuple[roles.Policy, ...]:
        cells = [(name, size) for name, sizes in self.ladders().items() for size in sizes]
        return tuple(dict.fromkeys(self.policy(*cell, seed) for cell in cells for seed in self.seeds))


CLAIM = register(
    Claim(
        id="C5",
        statement="More responses per prompt in policy training help at first and plateau quickly",
        paper="",
        statistic=(
            "gain in sampled exact accuracy per doubling of PPO's responses per prompt, at equal prompts and "
            "optimiser steps: mean of the first two doublings, and the last doubling minus half of that mean (a "
            "plateau: the last doubling brings less than half of what the first ones brought)"
        ),
        rule=Rule((Part("first doublings", "above"), Part("last doubling minus half of the first", "below"))),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C5: accuracy by ladder and responses per prompt, the gain of each doubling, and the claim's two statistics."""
    found = Collector(P, folders)
    before = found.before()
    for name, sizes in P.ladders().items():
        accuracy = []
        for size in sizes:
            policies = [P.policy(name, size, seed) for seed in P.seeds]
            accuracy.append(found.after(policies, ladder=name, responses_per_prompt=size))
        accuracy = np.array(accuracy)
        found.by_size("sampled_exact", accuracy, sizes, ladder=name)
        found.by_size("gain", accuracy - before, sizes, ladder=name)
        found.by_size("doubling_gain", np.diff(accuracy, axis=0), sizes[1:], ladder=name)
        if name == "ppo, equal prompts":
            parts = nested_bootstrap(accuracy, first_and_last_doubling, rng=new_rng(), on="means").split()
            result = CLAIM.judge(dict(zip(CLAIM.rule.intervals, parts, strict=True)))
            for quantity, part in zip(("first_doublings", "last_minus_half_of_first"), parts, strict=True):
                row = summary_row(quantity, part, ladder=name, responses_per_prompt=max(sizes))
                found.summary.append(row | {"verdict": result.verdict})
    extra = {"cost.csv": cost(P, folders)}
    return found.tables(result, extra=extra)


def first_and_last_doubling(means: np.ndarray) -> np.ndarray:
    """Of accuracies at 1, 2, 4, ... responses: the mean gain of the first two doublings, and the gain of the last one
    minus half of that."""
    doublings = np.diff(means)
    first = doublings[:2].mean()
    return np.array([first, doublings[-1] - first / 2])


LADDERS = {
    "ppo, equal prompts": (style.CATEGORIES[0], "s", "-"),
    "ppo, equal roll-outs": (style.CATEGORIES[0], "^", "--"),
    "grpo, equal prompts": (style.CATEGORIES[1], "o", "-"),
}
"""Colour, marker and line of each ladder of responses per prompt."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C5: accuracy against responses per prompt, and what each doubling brings.

    Args:
        runs: ``ladder``, ``responses_per_prompt``, ``seed``, ``metric``, ``value``; ``sampled_exact`` is drawn.
        summary: the common columns, ``ladder``, ``responses_per_prompt``, ``stage``, ``verdict``; quantities
            ``sampled_exact`` (by ladder and size; once with stage sft), ``doubling_gain`` (by ladder and the size that
            is reached), ``first_doublings`` and ``last_minus_half_of_first`` (one row each, with the verdict).
    """
    parts = [style.select(summary, name).iloc[0] for name in ("first_doublings", "last_minus_half_of_first")]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars: ')} PPO at equal prompts: "
        f"{style.signed_interval(parts[0])} for each of the first two doublings; the last one minus half of that: "
        f"{style.signed_interval(parts[1])}. C5: {parts[0].verdict}."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 3.1, caption)
    runs = runs[runs["metric"] == "sampled_exact"]
    start = style.select(summary, "sampled_exact", stage="sft").iloc[0]
    left.axhline(start.estimate, color="0.4", linewidth=1.0, linestyle=":")
    right.axhline(0, color="0.4", linewidth=0.8)
    handles = [Line2D([], [], color="0.4", linestyle=":", label="SFT")]
    for index, (name, (color, marker, linestyle)) in enumerate(LADDERS.items()):
        look = {"color": color, "marker": marker}
        style.draw_dots(left, runs[runs["ladder"] == name], "responses_per_prompt", color, size=5)
        rows = style.select(summary, "sampled_exact", ladder=name)
        style.draw_estimates(left, rows, "responses_per_prompt", linestyle=linestyle, **look)
        rows = style.select(summary, "doubling_gain", ladder=name)
        beside = rows["responses_per_prompt"] * 2 ** (0.12 * (index - 1))
        style.draw_estimates(right, rows.assign(place=beside), "place", linestyle="none", **look)
        label = name.replace("ppo", "PPO").replace("grpo", "GRPO")
        handles.append(Line2D([], [], linestyle=linestyle, label=label, **look))
    sizes = sorted({int(size) for size in runs["responses_per_prompt"].dropna()})
    style.doubling_axis(left, sizes)
    style.doubling_axis(right, sizes[1:], [f"to {size}" for size in sizes[1:]])
    left.set(title="accuracy", xlabel="responses per prompt", ylabel="sampled exact-match accuracy")
    right.set(title="gain of each doubling", xlabel="responses per prompt, doubled", ylabel="accuracy")
    legend(handles, ncols=4)
    return figure
