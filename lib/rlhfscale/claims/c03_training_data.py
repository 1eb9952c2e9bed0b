"""Do policies improve fast at first and then plateau with more training data? (claim C3)

PPO is run on more and more prompts, each seen once. The claim compares what the first quarter of the data brings with
what the rest brings. A side run with a weak KL penalty shows over-optimisation.
"""

from collections.abc import Callable
from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import MIN_POINTS, fit_saturation_exp, fit_with_intervals
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, last_updates, read_metrics, read_responses
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import NO_INTERVAL, Collector, Tables, band_rows, mean_intervals, new_rng

SATURATED = 0.95
"""Share of the fitted rise at which a policy counts as on its plateau."""


class Params(OnePolicy):
    """C3: accuracy, gold and proxy by the number of training prompts, each of which is seen once."""

    figure: ClassVar[str] = "03_training_data"
    title: ClassVar[str] = "More training data help policies at first, then they plateau"
    claims: ClassVar[tuple[str, ...]] = ("C3",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    updates: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="updates of each run; every update takes fresh prompts"
    )
    weak_kl: float = field(role="fixed", ge=0, doc="KL coefficient of the runs that go on to over-optimisation")
    weak_updates: int = field(role="fixed", ge=8, doc="updates of these runs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        if list(self.updates) != sorted(set(self.updates)) or self.updates[0] < 1:
            raise ValueError(f"updates: {list(self.updates)} must rise, from at least 1")
        if self.quarter not in self.updates or self.quarter * 4 != self.updates[-1]:
            raise ValueError(f"updates: must hold a quarter of the largest, {self.updates[-1] / 4:g}, for the claim")
        return self

    @property
    def quarter(self) -> int:
        """A quarter of the most updates, where the claim's early part ends."""
        return self.updates[-1] // 4

    def training_prompts(self, updates: int) -> int:
        return updates * self.settings.ppo_prompts

    def policy(self, updates: int, seed: int) -> roles.Policy:
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed).changed(num_updates=updates)

    def weak(self, seed: int) -> roles.Policy:
        """A policy that is hardly held to its reference."""
        policy = self.settings.policy(self.policy_rung, self.reward_model_rung, seed)
        return policy.changed(num_updates=self.weak_updates, kl_coefficient=self.weak_kl)

    def policies(self) -> tuple[roles.Policy, ...]:
        by_size = [self.policy(*cell) for cell in product(self.updates, self.seeds)]
        return (*by_size, *map(self.weak, self.seeds))


CLAIM = register(
    Claim(
        id="C3",
        statement="More training data help policies fast at first, then they plateau",
        paper="",
        statistic=(
            "gain in sampled exact accuracy from PPO on training prompts that are seen once each: what the first "
            "quarter of the data brings, and what the other three quarters bring minus half of that (a plateau: "
            "three times the data again bring less than half)"
        ),
        rule=Rule((Part("first quarter", "above"), Part("rest minus half of the first quarter", "below"))),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C3: accuracy by training prompts, the plateau of a fitted saturation, and gold and proxy against KL."""
    found = Collector(P, folders)
    before = found.before()
    accuracy = []
    for updates in P.updates:
        policies = [P.policy(updates, seed) for seed in P.seeds]
        accuracy.append(found.after(policies, training_prompts=P.training_prompts(updates)))
    accuracy, sizes = np.array(accuracy), [P.training_prompts(updates) for updates in P.updates]
    for quantity, values in (("sampled_exact", accuracy), ("gain", accuracy - before)):
        for size, interval in zip(sizes, mean_intervals(values).split(), strict=True):
            found.summary.append(summary_row(quantity, interval, training_prompts=size))
    found.summary += _plateau(np.array([0, *sizes]), np.array([before, *accuracy]))
    quarter, most = accuracy[P.updates.index(P.quarter)], accuracy[-1]
    parts = nested_bootstrap((before, quarter, most), first_and_rest, rng=new_rng(), on="means").split()
    result = CLAIM.judge(dict(zip(CLAIM.rule.intervals, parts, strict=True)))
    for quantity, part in zip(("first_quarter", "rest_minus_half_of_first"), parts, strict=True):
        found.summary.append(summary_row(quantity, part) | {"verdict": result.verdict})
    found.summary.append(summary_row("proxy_of_the_rest", _proxy_of_the_rest(P, folders)))
    found.after(map(P.weak, P.seeds), training_prompts=P.training_prompts(P.weak_updates), kl_coefficient=P.weak_kl)
    curves = training_curves(P, folders)
    found.summary += over_optimisation(curves[curves["kl_coefficient"] == P.weak_kl])
    return found.tables(result, extra={"training.csv": curves})


def first_and_rest(means: np.ndarray) -> np.ndarray:
    """Of the accuracies before training, after a quarter of the data and after all: what the first quarter brought, and
    what the rest brought minus half of that."""
    before, quarter, most = means
    return np.array([quarter - before, (most - quarter) - (quarter - before) / 2])


def _plateau(sizes: np.ndarray, accuracy: np.ndarray) -> list[dict]:
    """Rows of the fitted saturation: its curve, where it ends, and the prompts at which 95% of its rise are reached."""
    fit = fit_with_intervals(fit_saturation_exp, sizes, accuracy, rng=new_rng())
    end, scale = fit.intervals["y_inf"], fit.intervals["x0"]
    reached = scale.map(lambda x0: -x0 * np.log(1 - SATURATED))
    rows = band_rows("saturation_fit", "training_prompts", fit, end)
    return [*rows, summary_row("saturation_level", end), summary_row("saturated_at_prompts", reached)]


def _proxy_of_the_rest(P: Params, folders: Folders) -> Interval:
    """Proxy at the end of the longest run above that at the end of its first quarter, in s.d. of the score."""
    ends = [[last_updates(folders, P.policy(size, seed))["proxy"] for seed in P.seeds] for size in P.updates]
    ends = np.array(ends)
    return bootstrap(ends[-1] - ends[P.updates.index(P.quarter)], np.mean, unit="seed", rng=new_rng(), on="means")


def training_curves(P: Params, folders: Folders) -> pd.DataFrame:
    """Every update of the longest and of the weakly held runs; gold above the SFT model's and proxy above the first
    update's, in standard deviations of single responses (the proxy is in such units already)."""
    columns, tables = ["update", "proxy", "gold", "exact", "kl_nats"], []
    for seed in P.seeds:
        start = read_responses(folders, P.before(seed)).gold
        for policy in (P.policy(P.updates[-1], seed), P.weak(seed)):
            table = read_metrics(folders, policy)[columns]
            table["gold_sd"] = (table["gold"] - start.mean()) / start.std()
            table["proxy_sd"] = table["proxy"] - table["proxy"].iloc[0]
            tables.append(table.assign(seed=seed, kl_coefficient=policy.kl_coefficient))
    return pd.concat(tables, ignore_index=True)


def over_optimisation(curves: pd.DataFrame) -> list[dict]:
    """Rows of gold against the square root of KL: parameters a and b of each of `FORMS`, its R2, and its curve."""
    by_update = {
        name: curves.pivot_table(index="update", columns="seed", values=name) for name in ("kl_nats", "gold_sd")
    }
    d = np.sqrt(np.maximum(by_update["kl_nats"].to_numpy(), 0.0))
    values = {"d": d, "gold": by_update["gold_sd"].to_numpy()}
    grid, rows = np.linspace(0.05, d.mean(1).max(), 40), []
    for form, terms in FORMS.items():

        def fitted(means: dict[str, np.ndarray], terms=terms) -> np.ndarray:
            moved = means["d"] > 0.02  # log d
            a_b, *_ = np.linalg.lstsq(terms(means["d"][moved]), means["gold"][moved], rcond=None)
            residual = means["gold"][moved] - terms(means["d"][moved]) @ a_b
            return np.array([*a_b, 1 - residual.var() / means["gold"][moved].var(), *(terms(grid) @ a_b)])

        parts = bootstrap(values, fitted, unit="seed", num_draws=500, rng=new_rng(), on="means").split()
        for name, part in zip(("a", "b", "r2"), parts, strict=False):
            row = summary_row(f"over_optimisation_{name}", part, form=form)
            rows.append(row | (NO_INTERVAL if name == "r2" else {}))
        for place, part in zip(grid, parts[3:], strict=True):
            rows.append(summary_row("over_optimisation_fit", part, form=form, root_kl=place))
    return rows


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "d(a - b d)": lambda d: np.stack([d, -(d**2)], 1),
    "d(a - b log d)": lambda d: np.stack([d, -d * np.log(d)], 1),
}
"""Gold above the start as a function of the square root of the KL divergence, linear in a and b (Gao et al. 2023,
arXiv 2210.10760, found the first for best-of-N and the second for RL)."""
FORM_COLORS = {"d(a - b d)": style.CATEGORIES[2], "d(a - b log d)": style.CATEGORIES[4]}
ROOT_KL = "KL to reference (nats, sqrt axis)"


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """C3: accuracy against training prompts with its fitted saturation, and gold and proxy against KL.

    Args:
        runs: ``training_prompts``, ``stage`` (sft | ppo), ``kl_coefficient`` (of the weakly held runs alone), ``seed``,
            ``metric``, ``value``; the metric ``sampled_exact`` is drawn.
        summary: the common columns, ``training_prompts``, ``form``, ``root_kl``, ``verdict``; quantities
            ``sampled_exact``, ``saturation_fit``, ``saturated_at_prompts``, ``first_quarter``,
            ``rest_minus_half_of_first``, ``over_optimisation_fit`` and ``over_optimisation_r2``.
        training: one row per run and update: ``kl_coefficient``, ``seed``, ``kl_nats``, ``gold_sd``, ``proxy_sd``.
    """
    first, rest = (style.select(summary, name).iloc[0] for name in ("first_quarter", "rest_minus_half_of_first"))
    reached = style.select(summary, "saturated_at_prompts").iloc[0]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars and bands: ')} First quarter of the data: "
        f"{style.signed_interval(first)}; the rest minus half of that: {style.signed_interval(rest)}. "
        f"C3: {first.verdict}. "
        f"Fitted: 95% of the rise at {style.human_number(reached.estimate)} prompts "
        f"[{style.human_number(reached.ci_low)}, "
        f"{style.human_number(reached.ci_high)}]. Right: roll-outs of training, mean over seeds."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 3.1, caption)
    color = style.CATEGORIES[0]
    sampled = runs[(runs["metric"] == "sampled_exact") & runs["kl_coefficient"].isna()]
    start = sampled.loc[sampled["stage"] == "sft", "value"].mean()
    left.axhline(start, color="0.4", linestyle=":", linewidth=1.0)
    style.draw_dots(left, sampled[sampled["stage"] != "sft"], "training_prompts", color)
    rows = style.select(summary, "sampled_exact")
    rows = rows[rows["training_prompts"].notna()]
    style.draw_estimates(left, rows, "training_prompts", color=color, marker="s", linestyle="none")
    fit = style.select(summary, "saturation_fit")
    style.draw_band(left, fit[fit["training_prompts"] > 0], "training_prompts", color)
    sizes = sorted(rows["training_prompts"].astype(int))
    style.doubling_axis(left, sizes, [style.human_number(size) for size in sizes])
    left.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    left.set(title="accuracy", xlabel="training prompts, each seen once", ylabel="sampled exact-match accuracy")
    left.tick_params(axis="x", labelrotation=45)

    weak = training["kl_coefficient"].min()
    handles = _draw_over_optimisation(right, summary, training)
    kinds = [
        Line2D([], [], color=style.CATEGORIES[0], label=f"gold, KL coefficient {weak:g}"),
        Line2D([], [], color=style.CATEGORIES[0], linestyle="--", label="its proxy"),
        Line2D([], [], color="0.5", label=f"gold, KL coefficient {training['kl_coefficient'].max():g}"),
    ]
    legend([Line2D([], [], color="0.4", linestyle=":", label="SFT"), *kinds, *handles], ncols=3)
    return figure


def _draw_over_optimisation(axis: Axes, summary: pd.DataFrame, training: pd.DataFrame) -> list[Line2D]:
    """Draw gold and proxy against the root of the KL divergence, with the fitted forms; returns their handles."""
    weak = training["kl_coefficient"].min()
    for coefficient, runs_of in training.groupby("kl_coefficient"):
        width = 1.6 if coefficient == weak else 0.9
        for name, linestyle in (("gold_sd", "-"), ("proxy_sd", "--")):
            means = runs_of.groupby("update")[["kl_nats", name]].mean()
            smooth = means.rolling(5, min_periods=1, center=True).mean()
            shade = style.CATEGORIES[0] if coefficient == weak else "0.5"
            axis.plot(np.sqrt(smooth["kl_nats"].clip(lower=0)), smooth[name], linestyle, color=shade, linewidth=width)
    handles = []
    for form, shade in FORM_COLORS.items():
        style.draw_band(axis, style.select(summary, "over_optimisation_fit", form=form), "root_kl", shade)
        fit_quality = style.select(summary, "over_optimisation_r2", form=form).iloc[0].estimate
        handles.append(Line2D([], [], color=shade, label=f"gold: {form}, R2 {fit_quality:.2f}"))
    axis.axhline(0, color="0.4", linewidth=0.8)
    ticks = [kl for kl in (0.0, 0.1, 0.5, 1, 2, 4, 8, 16, 32) if kl <= training["kl_nats"].max() * 1.1]
    axis.set_xticks(np.sqrt(ticks), [f"{kl:g}" for kl in ticks])
    axis.set(title="over-optimisation", xlabel=ROOT_KL, ylabel="above the start (s.d. of responses)")
    return handles
