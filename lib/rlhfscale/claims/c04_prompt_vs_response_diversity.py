"""Do more prompts beat more responses to each, at equal numbers of labels? (claim C4)

Reward models are trained on a grid of prompts and responses per prompt. A plane is fitted to their accuracy over the
logarithms of both; the claim is about the difference between its two slopes.
"""

from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, best_of_n_gain, pair_accuracy, read_responses
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import NO_INTERVAL, Runs, Tables, mean_intervals, new_rng, per_prompt_table


class Params(StudyFigure):
    """C4: reward models by prompts and responses to each, at equal numbers of labels."""

    figure: ClassVar[str] = "04_prompt_vs_response_diversity"
    title: ClassVar[str] = "More prompts beat more responses per prompt at equal labels"
    claims: ClassVar[tuple[str, ...]] = ("C4",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    labels: tuple[int, ...] = field(role="scientific", min_length=2, doc="labelled responses in all, of each diagonal")
    responses: tuple[int, ...] = field(role="scientific", min_length=2, doc="responses to each prompt")
    batch_responses: int = field(role="fixed", ge=2, doc="responses in a batch, so that equal labels are equal steps")
    policy_rung: str = field(role="fixed", doc="rung of the policy that best-of-N is drawn from")
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        for name in ("labels", "responses"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or values[0] < 2:
                raise ValueError(f"{name}: {list(values)} must rise, from at least 2")
        for labels, size in product(self.labels, self.responses):
            if labels % (size * self.settings.label_parts):
                raise ValueError(f"labels: {labels} are no whole number of prompts with {size} responses of each rung")
            if self.batch_responses % size:
                raise ValueError(f"batch_responses: {size} does not divide {self.batch_responses}")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def cells(self) -> list[tuple[int, int]]:
        """Labels and responses per prompt of each cell of the grid."""
        return list(product(self.labels, self.responses))

    def reward_model(self, labels: int, responses: int, seed: int) -> roles.RewardModel:
        """Cells of equal ``responses`` share their labelled samples: the smaller takes the first prompts."""
        return self.settings.reward_model(
            self.reward_model_rung,
            seed,
            labels // responses,
            labelled_prompts=self.labels[-1] // responses,
            responses=responses,
            prompts_per_batch=self.batch_responses // responses,
        )

    @property
    def samples(self) -> roles.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, labels: int, responses: int, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.reward_model(labels, responses, seed))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        return (self.samples, *(self.reward_model(*cell) for cell in cells), *(self.scores(*cell) for cell in cells))


CLAIM = register(
    Claim(
        id="C4",
        statement="For reward-model data, more prompts beat more responses per prompt at equal labels",
        paper="",
        statistic=(
            "accuracy within held-out prompts that a reward model gains from a doubling of its prompts minus what "
            "it gains from a doubling of the responses to each, by a plane fitted over the logs of both; along a "
            "diagonal of equal labels this is the gain of trading one doubling for the other"
        ),
        rule=Rule((Part("prompts minus responses", "above"),)),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C4: accuracy within a prompt and best-of-N by cell, and what a doubling of prompts and of responses brings."""
    rows, summary, prompts = Runs(P), [], []
    drawn = read_responses(folders, P.samples)
    values = {"pair_accuracy": [], "best_of_n_gain": []}
    for labels, responses in P.cells():
        about = {"labels": labels, "responses_per_prompt": responses, "labelled_prompts": labels // responses}
        by_seed = {name: [] for name in values}
        for seed in P.seeds:
            model, scores = P.reward_model(labels, responses, seed), P.scores(labels, responses, seed)
            for name, spec, found in (
                ("pair_accuracy", model, pair_accuracy(folders, model)),
                ("best_of_n_gain", scores, best_of_n_gain(folders, scores, drawn.exact, P.best_of)),
            ):
                rows.add(
                    spec, {name: found.mean()}, rung=P.reward_model_rung, seed=seed, num_prompts=len(found), **about
                )
                prompts.append(per_prompt_table(spec, seed, name, found).assign(**about))
                by_seed[name].append(found)
        for name, found in by_seed.items():
            values[name].append(found)
    for name, cells in values.items():
        cells = np.array(cells)  # [cell, seed, prompt]
        for (labels, responses), interval in zip(P.cells(), mean_intervals(cells).split(), strict=True):
            about = {"labels": labels, "responses_per_prompt": responses, "labelled_prompts": labels // responses}
            summary.append(summary_row(name, interval, **about))
        parts = nested_bootstrap(cells, lambda means: doublings(P, means), rng=new_rng(), on="means").split()
        effects = dict(zip(("prompts", "responses", "difference", "interaction", "r2"), parts, strict=True))
        rows_of = {effect: summary_row(f"{name}_{effect}", part) for effect, part in effects.items()}
        rows_of["r2"] |= NO_INTERVAL
        if name == "pair_accuracy":
            result = CLAIM.judge(effects["difference"])
            rows_of["difference"]["verdict"] = result.verdict
        summary += rows_of.values()
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts, ignore_index=True), (result,))


def doublings(P: Params, means: np.ndarray) -> np.ndarray:
    """Of the fitted plane over the logs of prompts and responses: what a doubling of prompts brings, of responses, the
    difference; then the interaction of a fit that has one, and the plane's R2."""
    labels, responses = np.log2(np.array(P.cells(), float)).T
    x, y = labels - responses, responses
    plane = np.stack([np.ones_like(x), x - x.mean(), y - y.mean()], 1)
    (_, a, b), *_ = np.linalg.lstsq(plane, means, rcond=None)
    twisted = np.column_stack([plane, plane[:, 1] * plane[:, 2]])
    interaction = np.linalg.lstsq(twisted, means, rcond=None)[0][3]
    residual, spread = means - plane @ np.linalg.lstsq(plane, means, rcond=None)[0], means.var()
    return np.array([a, b, a - b, interaction, 1 - residual.var() / spread if spread else 0.0])


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C4: the grid of reward models, and their accuracy along diagonals of equal labels.

    Args:
        runs: ``labels``, ``responses_per_prompt``, ``seed``, ``metric``, ``value``; ``pair_accuracy`` is drawn.
        summary: the common columns, ``labels``, ``responses_per_prompt``, ``labelled_prompts``, ``verdict``;
            quantities ``pair_accuracy`` by cell and its ``_prompts``, ``_responses`` and ``_difference`` (one row each,
            the last with the verdict).
    """
    rows = style.select(summary, "pair_accuracy")
    effects = {
        name: style.select(summary, f"pair_accuracy_{name}").iloc[0] for name in ("prompts", "responses", "difference")
    }
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars: ')} A doubling of prompts brings "
        f"{style.signed_interval(effects['prompts'])}, of responses {style.signed_interval(effects['responses'])}; "
        "difference "
        f"{style.signed_interval(effects['difference'])}. C4: {effects['difference'].verdict}."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 2.9, caption)
    prompts, sizes = (sorted(rows[name].unique()) for name in ("labelled_prompts", "responses_per_prompt"))
    table = rows.pivot_table(index="labelled_prompts", columns="responses_per_prompt", values="estimate")
    picture = left.pcolormesh(table.to_numpy(), cmap="viridis", edgecolors="w", linewidth=1)
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (i, j), value in np.ndenumerate(table.to_numpy()):
        if np.isfinite(value):
            shade = "w" if value < middle else "k"
            left.text(j + 0.5, i + 0.5, f"{value:.3f}", ha="center", va="center", fontsize=7, color=shade)
    left.grid(False)
    left.set_xticks(np.arange(len(sizes)) + 0.5, [f"{size:.0f}" for size in sizes])
    left.set_yticks(np.arange(len(prompts)) + 0.5, [style.human_number(count) for count in prompts])
    left.set(title="within-prompt accuracy", xlabel="responses per prompt", ylabel="prompts")
    figure.colorbar(picture, ax=left, shrink=0.9)
    colors = style.size_colors({f"{labels:.0f}": labels for labels in sorted(rows["labels"].unique())})
    dots = runs[runs["metric"] == "pair_accuracy"]
    for labels, color in colors.items():
        style.draw_dots(right, dots[dots["labels"] == int(labels)], "responses_per_prompt", color, size=5)
        of = rows[rows["labels"] == int(labels)]
        style.draw_estimates(right, of, "responses_per_prompt", color=color, marker="o")
    style.doubling_axis(right, [int(size) for size in sizes])
    right.set(title="at equal labels", xlabel="responses per prompt", ylabel="within-prompt accuracy")
    named = [
        Line2D([], [], color=c, marker="o", label=f"{style.human_number(int(n))} labels") for n, c in colors.items()
    ]
    legend(named, ncols=len(named))
    return figure
