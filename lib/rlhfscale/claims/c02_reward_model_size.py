"""Do larger reward models help policy training, and less than they help best-of-N? (claim C2)

Reward models of several sizes judge for one policy: by choosing among its responses (best-of-N), and as the reward of
PPO. The claim compares how much each of the two gains for each doubling of the reward model's parameters.
"""

from functools import partial
from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import model_validator

from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, best_of_n_gain, pair_accuracy, read_responses
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, band_rows, mean_intervals, new_rng


class Params(OnePolicy):
    """C2: what a larger reward model gives to its own accuracy, to best-of-N and to PPO of one policy."""

    figure: ClassVar[str] = "02_reward_model_size"
    title: ClassVar[str] = "Larger reward models help policy training less than best-of-N"
    claims: ClassVar[tuple[str, ...]] = ("C2",)

    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def reward_model(self, rung: str, seed: int) -> roles.RewardModel:
        return self.settings.reward_model(rung, seed)

    def policy(self, rung: str, seed: int) -> roles.Policy:
        """The policy trained by PPO against a reward model of the rung."""
        return self.settings.policy(self.policy_rung, rung, seed)

    @property
    def samples(self) -> roles.Samples:
        """What best-of-N draws from, on the prompts on which PPO is evaluated."""
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, rung: str, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.reward_model(rung, seed))

    def policies(self) -> tuple[roles.Policy, ...]:
        return tuple(self.policy(rung, seed) for rung, seed in product(self.reward_model_rungs, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = list(product(self.reward_model_rungs, self.seeds))
        models = [self.reward_model(*cell) for cell in cells]
        return (*super().specs(), *models, self.samples, *(self.scores(*cell) for cell in cells))


CLAIM = register(
    Claim(
        id="C2",
        statement="Larger reward models help policy training, but less than they help best-of-N",
        paper="",
        statistic=(
            "slope of the gain in sampled exact accuracy per doubling of non-embedding reward-model parameters, "
            "policy fixed: of PPO, and of best-of-N minus that of PPO (N = 8 at the laptop tier; equal prompts)"
        ),
        rule=Rule((Part("PPO slope", "above"), Part("best-of-N slope minus PPO slope", "above"))),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C2: pair accuracy, best-of-N gain and PPO gain by reward-model rung, and their slopes per doubling."""
    found = Collector(P, folders)
    rungs, sizes = P.reward_model_rungs, [num_params(rung) for rung in P.reward_model_rungs]
    about = {rung: {"reward_model": rung, "reward_model_params": size} for rung, size in zip(rungs, sizes, strict=True)}
    drawn, before = read_responses(folders, P.samples), found.before()
    pairs, best, after = [], [], []
    for rung in rungs:
        accuracy = {seed: pair_accuracy(folders, P.reward_model(rung, seed)) for seed in P.seeds}
        for seed, values in accuracy.items():
            found.add(P.reward_model(rung, seed), seed, "pair_accuracy", values, rung=rung, **about[rung])
        pairs.append([*accuracy.values()])
        gain = [best_of_n_gain(folders, P.scores(rung, seed), drawn.exact, P.best_of) for seed in P.seeds]
        for seed, values in zip(P.seeds, gain, strict=True):
            found.add(P.scores(rung, seed), seed, "best_of_n_gain", values, num_responses=P.best_of, **about[rung])
        best.append(gain)
        after.append(found.after([P.policy(rung, seed) for seed in P.seeds], **about[rung]))
    values = {
        "pair_accuracy": np.array(pairs),
        "best_of_n_gain": np.array(best),
        "ppo_gain": np.array(after) - before,
    }
    slopes = {}
    for name, array in values.items():
        for rung, interval in zip(rungs, mean_intervals(array).split(), strict=True):
            found.summary.append(summary_row(name, interval, **about[rung]))
        slope = partial(slope_per_doubling, sizes)
        slopes[name] = nested_bootstrap(array, slope, rng=new_rng(), on="means")
        found.summary.append(summary_row(f"{name}_slope", slopes[name]))
        fit = fit_with_intervals(fit_slope, np.array(sizes), array, rng=new_rng())
        found.summary += band_rows(f"{name}_fit", "reward_model_params", fit, slopes[name])
    difference = nested_bootstrap(
        values["best_of_n_gain"] - values["ppo_gain"],
        lambda means: slope_per_doubling(sizes, means),
        rng=new_rng(),
        on="means",
    )
    intervals = dict(zip(CLAIM.rule.intervals, (slopes["ppo_gain"], difference), strict=True))
    result = CLAIM.judge(intervals)
    found.summary.append(summary_row("slope_difference", difference) | {"verdict": result.verdict})
    return found.tables(result)


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C2: pair accuracy, gain from best-of-N and gain from PPO against the reward model's size.

    Args:
        runs: ``reward_model_params``, ``stage`` (sft | ppo), ``seed``, ``num_responses`` (N), ``metric``, ``value``;
            metrics ``pair_accuracy``, ``best_of_n_gain`` and, by stage, ``sampled_exact``.
        summary: the common columns, ``reward_model_params`` and ``verdict``; quantities ``pair_accuracy``,
            ``best_of_n_gain`` and ``ppo_gain`` by size, of each its ``_fit`` (line and band on a grid of sizes) and
            ``_slope`` (one row), and ``slope_difference`` (one row, with the verdict).
    """
    difference = style.select(summary, "slope_difference").iloc[0]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars and bands: ')} "
        "Slopes are for each doubling of parameters. "
        f"Best-of-N slope minus PPO slope: {style.signed_interval(difference)}. C2: {difference.verdict}."
    )
    figure, axes, _ = style.new_figure(1, 3, 2.6, caption)
    sampled = runs[runs["metric"] == "sampled_exact"]
    start = sampled[sampled["stage"] == "sft"].set_index("seed")["value"]
    after = sampled[sampled["stage"] == "ppo"]
    dots = {
        "pair_accuracy": runs[runs["metric"] == "pair_accuracy"],
        "best_of_n_gain": runs[runs["metric"] == "best_of_n_gain"],
        "ppo_gain": after.assign(value=after["value"] - after["seed"].map(start)),
    }
    best_of = int(dots["best_of_n_gain"]["num_responses"].max())
    titles = {
        "pair_accuracy": ("pairs", "within-prompt pair accuracy"),
        "best_of_n_gain": (f"best-of-{best_of}", "gain in exact accuracy"),
        "ppo_gain": ("PPO", "gain in exact accuracy"),
    }
    for axis, color, (name, (title, label)) in zip(axes, style.CATEGORIES[2:5], titles.items(), strict=True):
        style.draw_dots(axis, dots[name], "reward_model_params", color)
        look = {"color": color, "marker": "o", "linestyle": "none"}
        style.draw_estimates(axis, style.select(summary, name), "reward_model_params", **look)
        style.draw_band(axis, style.select(summary, f"{name}_fit"), "reward_model_params", color)
        axis.set(title=title, ylabel=label)
        style.size_axis(axis, dots[name]["reward_model_params"], "reward-model size")
        axis.tick_params(axis="x", labelrotation=45)
        slope = style.select(summary, f"{name}_slope").iloc[0]
        style.add_headroom(axis, 0.25)
        text = f"slope {slope.estimate:+.4f}\n[{slope.ci_low:+.4f}, {slope.ci_high:+.4f}]"
        axis.text(0.03, 0.98, text, transform=axis.transAxes, va="top", fontsize=7)
    gains = axes[1:]
    low, high = min(0.0, *(axis.get_ylim()[0] for axis in gains)), max(axis.get_ylim()[1] for axis in gains)
    for axis in gains:
        axis.set_ylim(low, high)
        axis.axhline(0, color="0.4", linewidth=0.8)
    return figure
