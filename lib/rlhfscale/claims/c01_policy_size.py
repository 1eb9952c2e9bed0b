"""Do larger policies gain less from RLHF? (claim C1)

Policies of several sizes are trained by PPO against one fixed reward model. The gain is the accuracy after PPO minus
that before it; the claim is about the slope of the gain for each doubling of the policy's parameters.
"""

from itertools import product
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, read_metrics, read_responses
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Runs, Tables, band_rows, mean_intervals, new_rng, per_prompt_table, rung_rows


class Params(StudyFigure):
    """C1: the gain of PPO by policy size, against a fixed reward model."""

    figure: ClassVar[str] = "01_policy_size"
    title: ClassVar[str] = "Larger policies gain less from RLHF"
    claims: ClassVar[tuple[str, ...]] = ("C1",)

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the policies")
    reward_model_rung: str = field(role="fixed", doc="rung of the reward model that the verdict rests on")
    other_rungs: tuple[str, ...] = field(role="fixed", doc="further reward models, each fixed in its turn: side checks")
    other_seeds: tuple[int, ...] = field(role="fixed", doc="seeds of the side checks, some of seeds")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("other_rungs", self.other_rungs)
        if self.reward_model_rung in self.other_rungs:
            raise ValueError(f"other_rungs: {self.reward_model_rung} is the reward_model_rung already")
        if self.other_rungs and (len(set(self.other_seeds)) < 2 or not set(self.other_seeds) <= set(self.seeds)):
            raise ValueError(f"other_seeds: {list(self.other_seeds)} must be at least 2 of seeds {list(self.seeds)}")
        return self

    def policy(self, rung: str, seed: int, reward_model_rung: str | None = None) -> roles.Policy:
        return self.settings.policy(rung, reward_model_rung or self.reward_model_rung, seed)

    def other(self, reward_model_rung: str, rung: str, seed: int) -> roles.Samples:
        """Sampled responses of a policy that was trained against another reward model."""
        return self.settings.evaluation(self.policy(rung, seed, reward_model_rung), seed)

    def evaluations(self, stage: str, rung: str, seed: int) -> tuple[roles.Samples, roles.Samples]:
        """Sampled and greedy responses before (``sft``) or after (``ppo``) training."""
        model = self.policy(rung, seed) if stage == "ppo" else self.settings.start(rung, seed)
        return self.settings.evaluation(model, seed), self.settings.evaluation(model, seed, greedy=True)

    def specs(self) -> tuple[Spec, ...]:
        found = [
            item
            for rung in self.policy_rungs
            for seed in self.seeds
            for stage in ("sft", "ppo")
            for item in self.evaluations(stage, rung, seed)
        ]
        trained = [self.policy(rung, seed) for rung in self.policy_rungs for seed in self.seeds]
        others = [self.other(*cell) for cell in product(self.other_rungs, self.policy_rungs, self.other_seeds)]
        return tuple(dict.fromkeys([*found, *trained, *others]))


CLAIM = register(
    Claim(
        id="C1",
        statement="With a fixed reward model, larger policies gain less from RLHF",
        paper="average gain falls from 4.4% to 1.9% as the policy grows from 9B to 200B",
        statistic=(
            "slope of the gain in sampled exact-match accuracy from PPO (policy minus SFT) per doubling of "
            "non-embedding policy parameters, reward model fixed"
        ),
        rule=Rule((Part("slope", "below"),)),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C1: accuracy before and after PPO by policy rung and seed, gains, and their slope per doubling of parameters."""
    rows, prompts, cells = Runs(P), [], {}
    for stage in ("sft", "ppo"):
        for rung in P.policy_rungs:
            for seed in P.seeds:
                sampled_spec, greedy_spec = P.evaluations(stage, rung, seed)
                sampled, greedy = (read_responses(folders, spec) for spec in (sampled_spec, greedy_spec))
                cells[stage, rung, seed] = sampled.exact.mean(1)
                about = {"rung": rung, "stage": stage, "seed": seed, "num_prompts": sampled.num_prompts}
                metrics = {
                    "sampled_exact": sampled.exact.mean(),
                    "sampled_gold": sampled.gold.mean(),
                    "finished": sampled.finished.mean(),
                    "response_tokens": sampled.response_lengths.mean(),
                }
                rows.add(sampled_spec, metrics, **about)
                if stage == "ppo":
                    last = read_metrics(folders, sampled_spec.model).tail(5).mean()
                    training = {"kl_nats": last["kl_nats"], "proxy": last["proxy"]}
                    rows.add(sampled_spec.model, training, **about | {"num_prompts": P.settings.ppo_prompts})
                if stage == "ppo" or seed == P.seeds[0]:  # before training, greedy is one run for all seeds
                    rows.add(greedy_spec, {"greedy_exact": greedy.exact.mean()}, **about)
                per_prompt = per_prompt_table(sampled_spec, seed, "sampled_exact", cells[stage, rung, seed])
                prompts.append(per_prompt.assign(stage=stage, rung=rung))
    accuracy = {
        stage: np.array([[cells[stage, rung, seed] for seed in P.seeds] for rung in P.policy_rungs])
        for stage in ("sft", "ppo")
    }
    sizes = np.array([num_params(rung) for rung in P.policy_rungs])
    summary = []
    for stage, values in accuracy.items():
        summary += rung_rows("sampled_exact", P.policy_rungs, mean_intervals(values), stage=stage)
    gain = accuracy["ppo"] - accuracy["sft"]
    summary += rung_rows("gain", P.policy_rungs, mean_intervals(gain))
    both = (accuracy["sft"], accuracy["ppo"])
    headroom = nested_bootstrap(both, lambda m: (m[1] - m[0]) / (1 - m[0]), rng=new_rng(), on="means")
    summary += rung_rows("gain_per_headroom", P.policy_rungs, headroom)
    slope = nested_bootstrap(gain, lambda means: slope_per_doubling(sizes, means), rng=new_rng(), on="means")
    result = CLAIM.judge(slope)
    summary.append(summary_row("gain_slope", slope) | {"verdict": result.verdict})
    summary += band_rows("gain_fit", "num_params", fit_with_intervals(fit_slope, sizes, gain, rng=new_rng()), slope)
    for rung in P.other_rungs:
        summary += _other_reward_model(P, folders, rung, accuracy["sft"], sizes, rows)
    extra = {"training.csv": training_metrics(P, folders)}
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), (result,), extra)


def _other_reward_model(
    P: Params, folders: Folders, rung: str, before: np.ndarray, sizes: np.ndarray, rows: "Runs"
) -> list[dict[str, Any]]:
    """Summary rows of the gain and its slope with another fixed reward model; ``before`` [policy, seed, prompt]."""
    after = []
    for policy_rung in P.policy_rungs:
        for seed in P.other_seeds:
            spec = P.other(rung, policy_rung, seed)
            responses = read_responses(folders, spec)
            after.append(responses.exact.mean(1))
            about = {"rung": policy_rung, "stage": f"ppo by {rung}", "seed": seed}
            rows.add(spec, {"sampled_exact": responses.exact.mean()}, num_prompts=responses.num_prompts, **about)
    before = before[:, [P.seeds.index(seed) for seed in P.other_seeds]]
    gain = np.array(after).reshape(before.shape) - before
    slope = nested_bootstrap(gain, lambda means: slope_per_doubling(sizes, means), rng=new_rng(), on="means")
    about = {"reward_model": rung, "reward_model_params": num_params(rung)}
    found = rung_rows("other_gain", P.policy_rungs, mean_intervals(gain), **about)
    return [*found, summary_row("other_gain_slope", slope, **about)]


def training_metrics(P: Params, folders: Folders) -> pd.DataFrame:
    """Every update of every policy, as `plots.training_curves` wants it."""
    tables = []
    for rung in P.policy_rungs:
        for seed in P.seeds:
            table = read_metrics(folders, P.policy(rung, seed))
            about = {"rung": rung, "num_params": num_params(rung), "seed": seed}
            tables.append(
                table.rename(columns={"response_tokens": "response_length", "finished": "eos_share"}).assign(**about)
            )
    return pd.concat(tables, ignore_index=True)


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C1: accuracy and gain from PPO against the policy's size.

    Args:
        runs: ``rung``, ``num_params`` (non-embedding, of the policy), ``stage`` (sft | ppo), ``seed``, ``metric``,
            ``value``; the metric ``sampled_exact`` is drawn.
        summary: the common columns and ``num_params``, ``stage``, ``verdict``; quantities ``sampled_exact`` (by stage),
            ``gain`` (PPO - SFT by size), ``gain_fit`` (fitted line with its band on a grid of sizes), ``gain_slope``
            (one row, per doubling of parameters, with the claim's verdict); optionally ``other_gain`` (by size and
            ``reward_model``) and ``other_gain_slope``, side checks with other fixed reward models.
    """
    runs = runs[runs["metric"] == "sampled_exact"]
    slopes = style.select(summary, "other_gain_slope", optional=True)
    caption = style.interval_caption(
        summary[~summary["quantity"].str.startswith("other")], "dots: seeds; bars and band: "
    )
    if len(slopes):
        slopes = slopes.sort_values("reward_model_params")  # whatever the order of the table's rows
        shown = "; ".join(f"{row.reward_model} {style.signed_interval(row)}" for row in slopes.itertuples())
        caption += f" Slopes with other reward models ({slopes['num_seeds'].iloc[0]:.0f} seeds): {shown}."
    figure, (left, right), _ = style.new_figure(1, 2, 3.1, caption)
    styles = {"sft": ("SFT", style.CATEGORIES[7], "o"), "ppo": ("PPO", style.CATEGORIES[0], "s")}
    for stage, (label, color, marker) in styles.items():
        style.draw_dots(left, runs[runs["stage"] == stage], "num_params", color)
        rows = style.select(summary, "sampled_exact", stage=stage)
        style.draw_estimates(left, rows, "num_params", color=color, marker=marker, label=label)
    left.set(title="accuracy", ylabel="sampled exact-match accuracy")
    left.legend(loc="best")

    pairs = runs.pivot_table(index=["num_params", "seed"], columns="stage", values="value")
    gains = (pairs["ppo"] - pairs["sft"]).rename("value").reset_index()
    color = style.CATEGORIES[2]
    right.axhline(0, color="0.4", linewidth=0.8)
    style.draw_dots(right, gains, "num_params", color)
    style.draw_estimates(right, style.select(summary, "gain"), "num_params", color=color, marker="D", linestyle="none")
    style.draw_band(right, style.select(summary, "gain_fit"), "num_params", color)
    for row, linestyle in zip(slopes.itertuples(), ("--", ":", "-."), strict=False):
        rows = style.select(summary, "other_gain", reward_model=row.reward_model).sort_values("num_params")
        label = f"reward model {row.reward_model}"
        right.plot(rows["num_params"], rows["estimate"], color="0.45", linestyle=linestyle, label=label, zorder=1)
    if len(slopes):
        right.legend(loc="lower right")
    slope = style.select(summary, "gain_slope").iloc[0]
    right.set(title="gain from PPO", ylabel="accuracy, PPO minus SFT")
    style.add_headroom(right, 0.22)
    text = f"slope per doubling {slope.estimate:+.3f}\n95% interval [{slope.ci_low:+.3f}, {slope.ci_high:+.3f}]"
    right.text(0.98, 0.98, f"{text}\n{slope.verdict}", transform=right.transAxes, ha="right", va="top", fontsize=7)
    for axis in (left, right):
        style.size_axis(axis, runs["num_params"], "policy parameters (non-embedding)")
    return figure


@style.styled
def draw_training(metrics: pd.DataFrame) -> Figure:
    """Four panels of a policy's training: proxy, gold, KL, response length with the share ended by EOS.

    Args:
        metrics: one row per run and update: ``rung`` and ``num_params`` (of the policy), ``seed``, ``update``,
            ``proxy``, ``gold``, ``kl_nats`` (per sequence), ``response_length`` (tokens), ``eos_share``. Thin lines
            are seeds, thick lines their mean; colour is the rung.
    """
    sizes = dict(zip(metrics["rung"], metrics["num_params"], strict=True))
    colors = style.size_colors(sizes)
    caption = f"Thin lines: {metrics['seed'].nunique()} seeds; thick lines: their mean; no intervals."
    figure, axes, legend = style.new_figure(2, 2, 4.4, caption)
    proxy, gold, kl, length = axes.ravel()
    eos = length.twinx()
    eos.grid(False)
    eos.spines["right"].set_visible(True)
    panels = (
        (proxy, "proxy", "-", "proxy reward"),
        (gold, "gold", "-", "gold reward"),
        (kl, "kl_nats", "-", "KL to reference (nats)"),
        (length, "response_length", "-", "length (tokens), solid"),
        (eos, "eos_share", "--", "ended by EOS, dashed"),
    )
    for axis, column, linestyle, label in panels:
        for name, color in colors.items():
            table = metrics[metrics["rung"] == name].pivot_table(index="update", columns="seed", values=column)
            axis.plot(table.index, table, color=color, linewidth=0.5, alpha=0.35, linestyle=linestyle)
            axis.plot(table.index, table.mean(axis=1), color=color, linewidth=1.6, linestyle=linestyle)
        axis.set_ylabel(label)
    for axis in (kl, length):
        axis.set_xlabel("update")
    missing = max(0.02, 1 - metrics["eos_share"].min())
    eos.set_ylim(1 - 4 * missing, 1 + 0.2 * missing)  # dashed lines in the upper quarter
    style.add_headroom(length, 0.3)
    legend([Line2D([], [], color=c, label=f"{n} ({style.human_number(sizes[n])})") for n, c in colors.items()])
    return figure
