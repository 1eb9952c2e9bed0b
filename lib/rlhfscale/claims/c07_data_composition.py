"""Does the mix of a reward model's data matter? (claim C7)

A reward model can learn from three kinds of label: comparisons of responses (preference), right or wrong responses
(rejection sampling) and right or wrong steps (process supervision). Reward models are trained on several mixes of the
three, with a small and with a large number of labelled prompts. The claim compares the three kinds, each used alone.
"""

from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.bed import specs
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders, best_of_n_gain, pair_accuracy, read_responses
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, ClaimResult, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, mean_intervals, new_rng

KINDS = ("preference", "rejection sampling", "process")
"""The kinds of label: comparisons, right or wrong responses, right or wrong steps."""
SHARES = {kind: f"share_{kind.replace(' ', '_')}" for kind in KINDS}
"""The column of each kind's share in the tables."""
Mix = tuple[float, float, float]
"""Shares of the three kinds of label, in the order of `KINDS`; they sum to 1."""
CORNERS: tuple[Mix, ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""The mixes of one kind alone."""


class Params(OnePolicy):
    """Reward models from mixes of three kinds of label, at two numbers of labelled prompts."""

    figure: ClassVar[str] = "07_data_composition"
    from_scratch: ClassVar[str] = "07_data_composition needs labels of steps, and answers to its questions have none"
    title: ClassVar[str] = "The mix of reward-model data matters"
    claims: ClassVar[tuple[str, ...]] = ("C7",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    mixes: tuple[Mix, ...] = field(
        role="scientific", min_length=4, doc="shares of preference, rejection-sampling and process labels; all corners"
    )
    labelled_prompts: tuple[int, ...] = field(
        role="scientific", min_length=2, max_length=2, doc="labelled prompts of each reward model, two budgets"
    )
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")
    ppo_seeds: tuple[int, ...] = field(
        role="fixed", min_length=2, doc="seeds that also train policies, with the larger budget"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        for mix in self.mixes:
            if min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
                raise ValueError(f"mixes: {list(mix)} are not shares that sum to 1")
        if not {*CORNERS} <= {*self.mixes} or len({*self.mixes}) < len(self.mixes):
            raise ValueError("mixes: must hold each kind alone, [1.0, 0.0, 0.0] and so on, and no mix twice")
        if list(self.labelled_prompts) != sorted({*self.labelled_prompts}) or self.labelled_prompts[0] < 2:
            raise ValueError(f"labelled_prompts: {list(self.labelled_prompts)} must rise, from at least 2")
        if not {*self.ppo_seeds} <= {*self.seeds}:
            raise ValueError(f"ppo_seeds: {list(self.ppo_seeds)} must be among seeds")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def cells(self) -> list[tuple[Mix, int]]:
        """Return the mix and the number of labelled prompts of each reward model."""
        return list(product(self.mixes, self.labelled_prompts))

    def reward_model(self, mix: Mix, prompts: int, seed: int) -> specs.MixedRewardModel:
        """Return a reward model's spec. All sizes share their labelled responses: the smaller takes the first ones."""
        whole = self.settings.reward_model(self.reward_model_rung, seed)
        share = -(-self.labelled_prompts[-1] // len(whole.data))
        shared = ("base", "held_out", "epochs", "prompts_per_batch", "lr", "muon_lr", "lora_rank", "seed")
        return specs.MixedRewardModel(
            **{name: getattr(whole, name) for name in shared},
            data=tuple(part.changed(num_prompts=share) for part in whole.data),
            num_prompts=prompts,
            mix=mix,
        )

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, mix: Mix, prompts: int, seed: int) -> specs.Scores:
        return self.settings.scores(self.samples, self.reward_model(mix, prompts, seed))

    def policy(self, mix: Mix, seed: int) -> specs.Policy:
        policy = self.settings.policy(self.policy_rung, self.reward_model_rung, seed)
        return policy.changed(reward_model=self.reward_model(mix, self.labelled_prompts[-1], seed))

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.mixes, self.ppo_seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        models, scored = [self.reward_model(*cell) for cell in cells], [self.scores(*cell) for cell in cells]
        return (*super().specs(), self.samples, *models, *scored)


MIX_MARGIN = 0.01
"""Difference in exact accuracy below which two kinds of label count as equal."""
MIX_CONTRASTS = (
    "preference minus rejection sampling",
    "preference minus process",
    "rejection sampling minus process",
)
MIX_CONFIDENCE = 1 - 0.05 / len(MIX_CONTRASTS)
"""Confidence of each interval, by Bonferroni's correction: the three hold together at 95%."""

CLAIM = register(
    Claim(
        id="C7",
        statement="The data mix matters: preference, rejection-sampling and process data saturate differently",
        paper="",
        statistic=(
            "gain in exact accuracy of best-of-N (N = 8 at the laptop tier) by reward models from one kind of "
            "label alone, at the larger budget: the difference between two kinds; margin "
            f"{MIX_MARGIN}; intervals at 98.3%, so that the three differences hold together at 95%; premise: the "
            "mean gain over the kinds exceeds the margin"
        ),
        rule=Rule(
            (
                *(Part(contrast, "above", MIX_MARGIN) for contrast in MIX_CONTRASTS),
                *(Part(contrast, "below", -MIX_MARGIN) for contrast in MIX_CONTRASTS),
                Part("mean gain", "above", MIX_MARGIN, premise=True),
            ),
            combine="any",
        ),
    )
)


def measure(P: Params, made: Folders) -> Tables:
    """Return the accuracy of reward models, of best-of-N and of PPO for each mix, and the differences between kinds.

    The summary also says what the larger number of labelled prompts brings to each kind alone.
    """
    found = Collector(P, made)
    exact = read_responses(made, P.samples).exact
    gains = {}  # of best-of-N, each [seed][prompt]
    for mix, prompts in P.cells():
        about = _shares(mix) | {"labelled_prompts": prompts}
        pairs, gains[mix, prompts] = [], []
        for seed in P.seeds:
            model, scores = P.reward_model(mix, prompts, seed), P.scores(mix, prompts, seed)
            pairs.append(pair_accuracy(made, model))
            gains[mix, prompts].append(best_of_n_gain(made, scores, exact, P.best_of))
            found.add(model, seed, "pair_accuracy", pairs[-1], **about)
            found.add(scores, seed, "best_of_n_gain", gains[mix, prompts][-1], **about)
        for name, values in (("pair_accuracy", pairs), ("best_of_n_gain", gains[mix, prompts])):
            found.summary.append(summary_row(name, mean_intervals(np.array([values])).split()[0], **about))
    result = _compare_kinds(P, found, *(np.array([gains[mix, size] for mix in CORNERS]) for size in P.labelled_prompts))
    before = found.before()[[P.seeds.index(seed) for seed in P.ppo_seeds]]
    for mix in P.mixes:
        about = _shares(mix) | {"labelled_prompts": P.labelled_prompts[-1]}
        gain = found.after([P.policy(mix, seed) for seed in P.ppo_seeds], **about) - before
        found.summary.append(summary_row("ppo_gain", mean_intervals(gain[None]).split()[0], **about))
    return found.tables(result)


def _shares(mix: Mix) -> dict[str, float]:
    return dict(zip(SHARES.values(), mix, strict=True))


def _compare_kinds(P: Params, found: Collector, small: np.ndarray, large: np.ndarray) -> ClaimResult:
    """Judge the claim by gains of best-of-N from one kind alone [kind, seed, prompt], and add the summary's rows."""
    options = {"rng": new_rng(), "on": "means", "confidence": MIX_CONFIDENCE}
    parts = dict(zip(MIX_CONTRASTS, nested_bootstrap(large, contrasts, **options).split(), strict=True))
    gain = nested_bootstrap(large.mean(0), np.mean, **options)
    result = CLAIM.judge(parts | {"mean gain": gain})
    about = {"labelled_prompts": P.labelled_prompts[-1]}
    found.summary.append(summary_row("gain_in_all", gain, **about))
    for contrast, part in parts.items():
        row = summary_row("contrast", part, contrast=contrast, **about)
        found.summary.append(row | {"verdict": result.verdict})
    growth = large - small
    for kind, part in zip(KINDS, mean_intervals(growth).split(), strict=True):
        found.summary.append(summary_row("larger_budget_gain", part, kind=kind))
    for contrast, part in zip(MIX_CONTRASTS, nested_bootstrap(growth, contrasts, **options).split(), strict=True):
        found.summary.append(summary_row("larger_budget_contrast", part, contrast=contrast))
    return result


def contrasts(means: np.ndarray) -> np.ndarray:
    """Return the differences between the means of the three kinds, in the order of `MIX_CONTRASTS`."""
    preference, rejection, process = means
    return np.array([preference - rejection, preference - process, rejection - process])


KIND_COLORS = dict(zip(KINDS, style.CATEGORIES[:3], strict=True))


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw the mixes as points of a triangle, coloured by what their reward models reach, and each kind by budget.

    Args:
        runs: ``share_preference``, ``share_rejection_sampling``, ``share_process``, ``labelled_prompts``, ``seed``,
            ``metric``, ``value``; ``best_of_n_gain`` is drawn as dots.
        summary: the common columns, the shares, ``labelled_prompts``, ``contrast``, ``verdict``; quantities
            ``pair_accuracy``, ``best_of_n_gain`` (by mix and budget), ``ppo_gain`` (by mix) and ``contrast``.
    """
    contrasts = style.select(summary, "contrast")
    said = "; ".join(f"{row.contrast} {style.signed_interval(row)}" for row in contrasts.itertuples())
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars: ')} "
        f"Best-of-N at the larger budget (98.3% intervals): {said}. "
        f"{CLAIM.id}: {contrasts.iloc[0].verdict}."
    )
    figure, axes, legend = style.new_figure(2, 2, 4.6, caption)
    largest = summary[summary["labelled_prompts"] == summary["labelled_prompts"].max()]
    titles = {"pair_accuracy": "within-prompt accuracy", "best_of_n_gain": "best-of-N gain", "ppo_gain": "PPO gain"}
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
        _triangle(figure, axis, style.select(largest, name), title)
    axis, handles = axes[1, 1], []
    gains, dots = style.select(summary, "best_of_n_gain"), runs[runs["metric"] == "best_of_n_gain"]
    for index, (kind, color) in enumerate(KIND_COLORS.items()):
        beside = 2 ** (0.12 * (index - 1))
        seeds, alone = (table[table[SHARES[kind]] == 1.0] for table in (dots, gains))
        style.draw_dots(axis, seeds.assign(place=seeds["labelled_prompts"] * beside), "place", color, size=5)
        alone = alone.assign(place=alone["labelled_prompts"] * beside)
        style.draw_estimates(axis, alone, "place", color=color, marker="o")
        handles.append(Line2D([], [], color=color, marker="o", label=f"{kind} alone"))
    budgets = sorted(gains["labelled_prompts"].astype(int).unique())
    style.doubling_axis(axis, budgets, [style.human_number(count) for count in budgets])
    axis.set(title="each kind by budget", xlabel="labelled prompts", ylabel="best-of-N gain in accuracy")
    legend(handles, ncols=3)
    return figure


def _triangle(figure: Figure, axis, rows: pd.DataFrame, title: str) -> None:
    """Draw mixes in a triangle whose corners are the kinds, coloured and labelled by their estimates."""
    corners = np.array([(0.0, 0.0), (1.0, 0.0), (0.5, np.sqrt(0.75))])
    places = rows[[*SHARES.values()]].to_numpy() @ corners
    axis.plot(*corners[[0, 1, 2, 0]].T, color="0.6", linewidth=0.8, zorder=1)
    points = axis.scatter(*places.T, c=rows["estimate"], cmap="viridis", s=60, zorder=2)
    labels = [(f"{value:.3f}", place, 6, 6) for value, place in zip(rows["estimate"], places, strict=True)]
    labels += [(kind, corner, above, 7) for kind, corner, above in zip(KINDS, corners, (-12, -12, 14), strict=True)]
    for text, place, above, size in labels:
        axis.annotate(text, place, (0, above), textcoords="offset points", ha="center", fontsize=size)
    axis.set(title=title, xlim=(-0.25, 1.25), ylim=(-0.2, 1.15), aspect="equal")
    axis.axis("off")
    figure.colorbar(points, ax=axis, shrink=0.7)
