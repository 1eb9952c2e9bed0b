"""Every figure from its tidy tables, offline.

Each figure is a pure function from the tables of a result folder (columns: see each function, and
`study.results` for the common ones) to a matplotlib Figure. Numbers, intervals and verdicts are read from
the tables, never computed here, except for what only places ink: means of dots and differences of paired dots.
"""

import io
import textwrap
from collections.abc import Callable, Mapping
from functools import wraps

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from rlhfscale.evals.best_of_n import kl_bound_nats

WIDTH_IN = 5.5
CATEGORIES = sns.color_palette("colorblind")
STYLE = {
    **sns.axes_style("ticks", {"axes.grid": True, "grid.color": "0.92", "grid.linewidth": 0.6}),
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


REAL_STAGES = {
    "chat": ("chat model", CATEGORIES[7]),
    "tuned": ("fine-tuned", CATEGORIES[1]),
    "score-lora": ("PPO by score, LoRA", CATEGORIES[3]),
    "score-qlora": ("PPO by score, QLoRA", CATEGORIES[4]),
    "mixed-lora": ("PPO by score and verifier, LoRA", CATEGORIES[0]),
    "mixed-qlora": ("PPO by score and verifier, QLoRA", CATEGORIES[2]),
}
"""Label and colour of each stage of the pipeline on a published model."""


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, without pyplot or a magic."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def styled(*tables: pd.DataFrame) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*tables)

    return styled


def size_colors(rungs: Mapping[str, float]) -> dict[str, tuple]:
    """A viridis colour for each rung, spaced by the log of its size.

    Args:
        rungs: number of parameters by rung name.

    Returns:
        RGBA by rung name, smallest first.
    """
    order = sorted(rungs, key=rungs.get)
    logs = np.log([rungs[name] for name in order])
    place = (logs - logs[0]) / (logs[-1] - logs[0]) if logs[-1] > logs[0] else np.full(len(logs), 0.5)
    return {name: matplotlib.colormaps["viridis"](0.9 * p) for name, p in zip(order, place, strict=True)}


@styled
def policy_size(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
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
    slopes = select(summary, "other_gain_slope", optional=True)
    caption = interval_caption(summary[~summary["quantity"].str.startswith("other")], "dots: seeds; bars and band: ")
    if len(slopes):
        slopes = slopes.sort_values("reward_model_params")  # whatever the order of the table's rows
        shown = "; ".join(f"{row.reward_model} {signed_interval(row)}" for row in slopes.itertuples())
        caption += f" Slopes with other reward models ({slopes['num_seeds'].iloc[0]:.0f} seeds): {shown}."
    figure, (left, right), _ = new_figure(1, 2, 3.1, caption)
    styles = {"sft": ("SFT", CATEGORIES[7], "o"), "ppo": ("PPO", CATEGORIES[0], "s")}
    for stage, (label, color, marker) in styles.items():
        draw_dots(left, runs[runs["stage"] == stage], "num_params", color)
        rows = select(summary, "sampled_exact", stage=stage)
        draw_estimates(left, rows, "num_params", color=color, marker=marker, label=label)
    left.set(title="accuracy", ylabel="sampled exact-match accuracy")
    left.legend(loc="best")

    pairs = runs.pivot_table(index=["num_params", "seed"], columns="stage", values="value")
    gains = (pairs["ppo"] - pairs["sft"]).rename("value").reset_index()
    color = CATEGORIES[2]
    right.axhline(0, color="0.4", linewidth=0.8)
    draw_dots(right, gains, "num_params", color)
    draw_estimates(right, select(summary, "gain"), "num_params", color=color, marker="D", linestyle="none")
    draw_band(right, select(summary, "gain_fit"), "num_params", color)
    for row, linestyle in zip(slopes.itertuples(), ("--", ":", "-."), strict=False):
        rows = select(summary, "other_gain", reward_model=row.reward_model).sort_values("num_params")
        label = f"reward model {row.reward_model}"
        right.plot(rows["num_params"], rows["estimate"], color="0.45", linestyle=linestyle, label=label, zorder=1)
    if len(slopes):
        right.legend(loc="lower right")
    slope = select(summary, "gain_slope").iloc[0]
    right.set(title="gain from PPO", ylabel="accuracy, PPO minus SFT")
    add_headroom(right, 0.22)
    text = f"slope per doubling {slope.estimate:+.3f}\n95% interval [{slope.ci_low:+.3f}, {slope.ci_high:+.3f}]"
    right.text(0.98, 0.98, f"{text}\n{slope.verdict}", transform=right.transAxes, ha="right", va="top", fontsize=7)
    for axis in (left, right):
        size_axis(axis, runs["num_params"], "policy parameters (non-embedding)")
    return figure


@styled
def best_of_n(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C6: best-of-N accuracy against N, and gold and proxy against the bound on KL.

    Args:
        runs: ``reward_model`` (rung name), ``num_responses``, ``seed``, ``metric``, ``value``; the metric
            ``best_of_n`` (exact accuracy) is drawn as dots.
        summary: the common columns and ``reward_model`` (rung name, empty where none is used),
            ``reward_model_params``, ``num_responses``, ``verdict``. Quantities in exact accuracy by ``num_responses``:
            ``best_of_n`` (by reward model), ``majority_vote``, ``pass_at_n`` and optionally ``weighted_vote``; in
            standard deviations of single responses of the initial policy, minus its mean, by reward model and
            ``num_responses``: ``best_of_n_gold`` and ``best_of_n_proxy``; ``early_minus_late_gain`` (one row) holds
            the claim's statistic, its sizes ``first``, ``early``, ``late`` and ``last``, and the verdict.
    """
    bon = select(summary, "best_of_n")
    sizes = dict(zip(bon["reward_model"], bon["reward_model_params"], strict=True))
    colors = size_colors(sizes)
    caption = interval_caption(summary, "dots: seeds; bars: ")
    claim = select(summary, "early_minus_late_gain").iloc[0]
    early, late = (f"{claim[a]:.0f}-{claim[b]:.0f}" for a, b in (("first", "early"), ("late", "last")))
    caption += (
        f" Gain per doubling, N = {early} minus N = {late}: {claim.estimate:+.3f} "
        f"[{claim.ci_low:+.3f}, {claim.ci_high:+.3f}], {claim.verdict}."
    )
    figure, (left, right), legend = new_figure(1, 2, 3.9, caption)
    votes = {
        "pass_at_n": ("pass@N (ceiling)", "0.15", "-"),
        "majority_vote": ("majority vote", CATEGORIES[3], "--"),
        "weighted_vote": ("vote weighted by proxy", CATEGORIES[1], "--"),
    }
    handles = []
    for quantity, (label, color, linestyle) in votes.items():
        rows = select(summary, quantity, optional=quantity == "weighted_vote")
        if len(rows):
            draw_estimates(left, rows, "num_responses", color=color, linestyle=linestyle, marker="")
            handles.append(Line2D([], [], color=color, linestyle=linestyle, label=label))
    ceiling = select(summary, "pass_at_n").sort_values("num_responses")
    left.axhline(ceiling["estimate"].iloc[0], color="0.5", linestyle=":", linewidth=1.2)
    handles.append(Line2D([], [], color="0.5", linestyle=":", label="pass@1 (floor)"))
    dots = runs[runs["metric"] == "best_of_n"]
    for name, color in colors.items():
        draw_dots(left, dots[dots["reward_model"] == name], "num_responses", color, size=4)
        rows = bon[bon["reward_model"] == name]
        draw_estimates(left, rows, "num_responses", color=color, marker="o", markersize=2.5)
        for quantity, linestyle in (("best_of_n_gold", "-"), ("best_of_n_proxy", "--")):
            curve = select(summary, quantity, reward_model=name).sort_values("num_responses")
            kl_nats = kl_bound_nats(curve["num_responses"])
            alpha = 1.0 if linestyle == "-" else 0.55
            right.plot(kl_nats, curve["estimate"], color=color, linestyle=linestyle, alpha=alpha)
            if linestyle == "-":
                right.fill_between(kl_nats, curve["ci_low"], curve["ci_high"], color=color, alpha=0.15, linewidth=0)
    largest = int(bon["num_responses"].max())
    left.set_xscale("log", base=2)
    left.set_xticks(ticks := [n for n in (1, 4, 16, 64, 256, 1024) if n <= largest], [str(n) for n in ticks])
    left.xaxis.set_minor_locator(NullLocator())
    left.set(title="accuracy", xlabel="N, responses per prompt", ylabel="exact-match accuracy")
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    limit = float(kl_bound_nats([largest])[0])
    right.set_xlim(0, limit * 1.03)
    right.set_xticks(ticks := [kl for kl in (0, 0.25, 1, 2, 3, 4, 5, 6) if kl <= limit], [f"{kl:g}" for kl in ticks])
    right.set(title="over-optimisation", xlabel="KL upper bound (nats, sqrt axis)", ylabel="score above N = 1 (s.d.)")
    labels = [Line2D([], [], color=c, label=f"RM {human_number(sizes[name])}") for name, c in colors.items()]
    types = [
        Line2D([], [], color="0.3", label="gold (right)"),
        Line2D([], [], color="0.3", linestyle="--", alpha=0.55, label="proxy (right)"),
    ]
    legend([*labels, *handles, *types], ncols=4)
    return figure


@styled
def test_bed(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The laptop ladder: loss against compute, accuracy against size, reward models against size and data.

    Args:
        runs: ``rung``, ``num_params``, ``train_flops``, ``family``, ``num_pairs``, ``seed``, ``metric``, ``value``
            (cells that do not apply are empty). Metrics: ``excess_loss``, held-out loss above the demonstrators'
            own (by ``train_flops``), ``sampled_exact`` and ``greedy_exact`` (by ``num_params`` and ``family``),
            ``pairwise_accuracy`` (by the reward model's ``rung``, ``num_params`` and ``num_pairs``).
        summary: the common columns and those of ``runs``; the same quantities, and ``loss_fit`` (curve and band on a
            grid of ``train_flops``), ``loss_exponent`` and ``loss_r2`` (one row each).
    """
    dots_caption = interval_caption(summary, "dots: seeds; bars and band: ")
    figure, ((loss, accuracy), (by_size, by_pairs)), legend = new_figure(2, 2, 5.0, dots_caption)
    ladder = runs.dropna(subset=["num_params"])
    colors = size_colors(dict(zip(ladder["rung"], ladder["num_params"], strict=True)))

    points = select(summary, "excess_loss")
    seeds = runs[runs["metric"] == "excess_loss"]
    draw_band(loss, select(summary, "loss_fit"), "train_flops", "0.35", linestyle="--")
    for row in points.itertuples():
        draw_dots(loss, seeds[seeds["rung"] == row.rung], "train_flops", colors[row.rung])
        draw_estimates(loss, points[points["rung"] == row.rung], "train_flops", color=colors[row.rung], marker="o")
    exponent, r2 = select(summary, "loss_exponent").iloc[0], select(summary, "loss_r2").iloc[0]
    text = f"exponent {exponent.estimate:.2f} [{exponent.ci_low:.2f}, {exponent.ci_high:.2f}]\nR² = {r2.estimate:.3f}"
    loss.text(0.97, 0.97, text, transform=loss.transAxes, ha="right", va="top", fontsize=7)
    loss.set(xscale="log", yscale="log", title="(a) loss against compute", xlabel="pretraining compute (FLOPs)")
    loss.set_ylabel("excess loss (nats/token)")
    low, high = loss.get_ylim()
    ticks = [t for power in range(-4, 2) for t in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= t <= high]
    loss.set_yticks(ticks, [f"{t:g}" for t in ticks])
    loss.yaxis.set_minor_formatter(NullFormatter())

    families = sorted(select(summary, "sampled_exact")["family"].unique())
    for family, color in zip(families, CATEGORIES, strict=False):
        for metric, linestyle, marker in (("sampled_exact", "-", "o"), ("greedy_exact", "--", "^")):
            chosen = runs[(runs["metric"] == metric) & (runs["family"] == family)]
            draw_dots(accuracy, chosen, "num_params", color, size=4)
            rows = select(summary, metric, family=family)
            label = f"{family}, {metric.removesuffix('_exact')}"
            draw_estimates(accuracy, rows, "num_params", color=color, linestyle=linestyle, marker=marker, label=label)
    accuracy.set(title="(b) accuracy of SFT", ylabel="exact-match accuracy")
    size_axis(accuracy, select(summary, "sampled_exact")["num_params"], "policy parameters")
    add_headroom(accuracy, 0.25 * len(families))
    accuracy.set_yticks([t for t in accuracy.get_yticks() if 0 <= t <= 1])
    accuracy.legend(loc="upper left", handlelength=2.4, borderpad=0, labelspacing=0.25)

    pairwise = select(summary, "pairwise_accuracy")
    pair_dots = runs[runs["metric"] == "pairwise_accuracy"]
    full = pairwise["num_pairs"].max()
    top = pairwise[pairwise["num_pairs"] == full]
    draw_estimates(by_size, top, "num_params", color="0.35", marker="")
    for name in top["rung"]:
        chosen = (pair_dots["rung"] == name) & (pair_dots["num_pairs"] == full)
        draw_dots(by_size, pair_dots[chosen], "num_params", colors[name])
        draw_estimates(by_size, top[top["rung"] == name], "num_params", color=colors[name], marker="o")
    by_size.set(title=f"(c) reward model, {human_number(full)} pairs", ylabel="within-prompt pair accuracy")
    size_axis(by_size, top["num_params"], "reward-model parameters")

    swept = [name for name, rows in pairwise.groupby("rung") if rows["num_pairs"].nunique() > 1]
    for name in (name for name in colors if name in swept):
        draw_dots(by_pairs, pair_dots[pair_dots["rung"] == name], "num_pairs", colors[name])
        rows = pairwise[pairwise["rung"] == name]
        draw_estimates(by_pairs, rows, "num_pairs", color=colors[name], marker="o")
    by_pairs.set(title="(d) reward model by data", ylabel="within-prompt pair accuracy")
    size_axis(by_pairs, pairwise[pairwise["rung"].isin(swept)]["num_pairs"], "labelled pairs")
    for axis in (by_size, by_pairs):
        axis.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_ylim(min(0.45, pair_dots["value"].min() - 0.03), 1.0)
    sizes = dict(zip(ladder["rung"], ladder["num_params"], strict=True))
    legend([Line2D([], [], color=c, marker="o", label=f"{n} ({human_number(sizes[n])})") for n, c in colors.items()])
    return figure


@styled
def training_curves(metrics: pd.DataFrame) -> Figure:
    """Four panels of a policy's training: proxy, gold, KL, response length with the share ended by EOS.

    Args:
        metrics: one row per run and update: ``rung`` and ``num_params`` (of the policy), ``seed``, ``update``,
            ``proxy``, ``gold``, ``kl_nats`` (per sequence), ``response_length`` (tokens), ``eos_share``. Thin lines
            are seeds, thick lines their mean; colour is the rung.
    """
    sizes = dict(zip(metrics["rung"], metrics["num_params"], strict=True))
    colors = size_colors(sizes)
    caption = f"Thin lines: {metrics['seed'].nunique()} seeds; thick lines: their mean; no intervals."
    figure, axes, legend = new_figure(2, 2, 4.4, caption)
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
    add_headroom(length, 0.3)
    legend([Line2D([], [], color=c, label=f"{n} ({human_number(sizes[n])})") for n, c in colors.items()])
    return figure


@styled
def live_run(runs: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Three panels of one run, also of one that still goes on: gold, proxy and KL by update.

    Args:
        runs: ``update``, ``metric`` (of which ``gold``, ``proxy`` and ``kl_nats`` are drawn), ``value``; rows without
            an update are left out. Dots are updates, lines their running mean over five.
        summary: the common columns and ``stage``; quantity ``sampled_exact`` (sft | ppo) for the caption.
    """
    updates = runs.dropna(subset="update").pivot_table(index="update", columns="metric", values="value")
    caption = "Dots: updates of one run; lines: mean over five updates."
    if summary is not None:
        texts = {}
        for stage in ("sft", "ppo"):
            row = select(summary, "sampled_exact", stage=stage).iloc[0]
            texts[stage] = f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
        caption += (
            f" Exactly right on {row.num_prompts} held-out prompts: {texts['sft']} before, {texts['ppo']} after"
            f" (95% intervals, {row.ci_method})."
        )
    figure, axes, _ = new_figure(1, 3, 1.9, caption)
    panels = {
        "gold": ("gold", "verifier's reward", CATEGORIES[2]),
        "proxy": ("proxy", "reward model's score (s.d.)", CATEGORIES[1]),
        "kl_nats": ("KL to reference", "nats for each response", CATEGORIES[0]),
    }
    for axis, (metric, (title, unit, color)) in zip(axes, panels.items(), strict=True):
        values = updates[metric]
        axis.scatter(values.index, values, s=7, color=[color], alpha=0.45, linewidths=0)
        axis.plot(values.rolling(5, min_periods=1, center=True).mean(), color=color, linewidth=1.8)
        axis.set(title=title, ylabel=unit, xlabel="update")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[2].set_ylim(bottom=min(0.0, updates["kl_nats"].min()))
    return figure


@styled
def real_model(runs: pd.DataFrame, summary: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """Accuracy by task and stage, PPO's roll-outs update by update, and response lengths.

    Args:
        runs: ``stage``, ``task``, ``seed``, ``metric``, ``value``; metrics ``sampled_accuracy`` and
            ``sampled_response_tokens``.
        summary: the common columns, ``stage`` and ``task``; quantity ``sampled_accuracy``.
        training: ``stage``, ``seed``, ``update`` and ``right``, the share of right roll-outs.
    """
    rows = select(summary, "sampled_accuracy")
    stages = [name for name in REAL_STAGES if name in set(rows["stage"])]
    tasks = sorted(set(rows["task"]), key=lambda task: (task == "all", task))
    caption = interval_caption(summary, "dots: seeds; bars: ") + " A response is right if the last number in it is."
    figure, axes, legend = new_figure(2, 2, 4.6, caption)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    top, left, right = figure.add_subplot(grid[0, :]), axes[1, 0], axes[1, 1]
    for number, stage in enumerate(stages):
        color = REAL_STAGES[stage][1]
        shift = 0.16 * (number - (len(stages) - 1) / 2)
        for place, task in enumerate(tasks):
            at = {"x": place + shift}
            draw_estimates(top, select(rows, "sampled_accuracy", stage=stage, task=task).assign(**at), "x",
                       color=color, marker="o", linestyle="none")  # fmt: skip
            of = runs[(runs["metric"] == "sampled_accuracy") & (runs["stage"] == stage) & (runs["task"] == task)]
            if len(of):
                draw_dots(top, of.assign(**at), "x", color)
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


@styled
def benchmarks(summary: pd.DataFrame, mt_bench: pd.DataFrame | None = None) -> Figure:
    """Win rates with intervals beside the difference in length, a row for each model.

    Args:
        summary: the common columns and ``model``, ``planted`` (the true win rate at equal length, percent),
            ``interval``; quantities ``win_rate`` and ``length_controlled`` in percent, ``extra_chars``, and
            ``coverage`` of the two kinds of ``interval`` for the caption.
        mt_bench: estimates of MT-Bench, whose pairs are drawn as a further row; None leaves it out.
    """
    rows = [(name, select(summary, "win_rate", model=name)) for name in select(summary, "win_rate")["model"]]
    place = {name: float(len(rows) - index) for index, (name, _) in enumerate(rows)}
    first = select(summary, "win_rate").iloc[0]
    caption = f"Planted models: 95% intervals ({first.ci_method}), {first.num_prompts} instructions each."
    for name in ("refit", "published"):
        row = select(summary, "coverage", interval=name).iloc[0]
        label = {"refit": "intervals that refit", "published": "the published standard error"}[name]
        caption += f" Coverage of {label}: {row.estimate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]."
    pairs = None
    if mt_bench is not None:
        pairs = select(mt_bench, "mt_bench/win_rate_adjusted").iloc[0]
        caption += f" MT-Bench: {pairs.num_prompts} questions, judge {pairs.judge}."
    figure, (left, right), legend = new_figure(1, 2, 1.3 + 0.42 * (len(place) + (pairs is not None)), caption)
    kinds = {
        "win_rate": ("raw", CATEGORIES[7], "o", 0.14),
        "length_controlled": ("at equal length", CATEGORIES[0], "s", -0.14),
    }
    handles = []
    for quantity, (label, color, marker, shift) in kinds.items():
        table = select(summary, quantity)
        draw_across(left, table, table["model"].map(place) + shift, color, marker)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=label))
    truth = select(summary, "length_controlled")
    left.scatter(
        truth["planted"], truth["model"].map(place) - 0.14, marker="|", s=120, color="k", linewidths=1.4, zorder=4
    )
    handles.append(Line2D([], [], color="k", marker="|", markersize=9, linestyle="none", label="planted truth"))
    table = select(summary, "extra_chars")
    draw_across(right, table, table["model"].map(place), CATEGORIES[2], "D")
    if pairs is not None:
        percent = pd.DataFrame([pairs[["estimate", "ci_low", "ci_high"]].astype(float) * 100])
        draw_across(left, percent, pd.Series([0.0]), CATEGORIES[3], "D")
        draw_across(right, select(mt_bench, "mt_bench/extra_chars"), pd.Series([0.0]), CATEGORIES[2], "D")
        handles.append(Line2D([], [], color=CATEGORIES[3], marker="D", linestyle="none", label="MT-Bench pairs"))
        place = place | {"MT-Bench": 0.0}
    left.axvline(50, color="0.4", linewidth=0.8)
    right.axvline(0, color="0.4", linewidth=0.8)
    left.set(title="win rate", xlabel="percent", xlim=(0, 100), yticks=list(place.values()), yticklabels=list(place))
    right.set(title="length", xlabel="characters more than the other side", yticks=list(place.values()), yticklabels=[])
    for axis in (left, right):
        axis.set_ylim(min(place.values()) - 0.5, max(place.values()) + 0.5)
    legend(handles, ncols=4)
    return figure


def draw_across(axis, rows: pd.DataFrame, y: pd.Series, color, marker: str) -> None:
    """Estimates with intervals along x."""
    errors = [rows["estimate"] - rows["ci_low"], rows["ci_high"] - rows["estimate"]]
    style = {"color": color, "marker": marker, "linestyle": "none", "elinewidth": 1.0, "capsize": 1.5, "zorder": 3}
    axis.errorbar(rows["estimate"], y.to_numpy(), xerr=errors, **style)


def new_figure(rows: int, columns: int, height: float, caption: str):
    """A figure with its axes and caption, and a function that draws a shared legend between the two."""
    text = "\n".join(textwrap.wrap(caption, 96))
    line = 0.14
    below = line * (text.count("\n") + 1) + 0.1
    figure = Picture(figsize=(WIDTH_IN, height + below), layout="constrained")
    axes = figure.subplots(rows, columns)
    figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)), wspace=0.06)
    figure.text(0.01, 0.05 / (height + below), text, fontsize=7, color="0.25", va="bottom", linespacing=1.25)

    def legend(handles: list[Line2D], ncols: int = 5) -> None:
        rows = -(-len(handles) // ncols)
        figure.legend(handles=handles, loc="outside upper center", ncols=-(-len(handles) // rows), columnspacing=1.4)

    return figure, axes, legend


def select(summary: pd.DataFrame, quantity: str, optional: bool = False, **conditions) -> pd.DataFrame:
    chosen = summary["quantity"] == quantity
    for column, value in conditions.items():
        chosen &= summary[column] == value
    if not chosen.any() and not optional:
        wanted = ", ".join([quantity, *(f"{c} = {v}" for c, v in conditions.items())])
        raise ValueError(f"the summary has no row for {wanted}")
    return summary[chosen]


def draw_dots(axis, runs: pd.DataFrame, x: str, color, size: float = 7) -> None:
    """Every seed, 3.5 points to the left of its x so that the estimate does not cover it."""
    place = axis.transData + ScaledTranslation(-3.5 / 72, 0, axis.figure.dpi_scale_trans)
    style = {"color": [color], "alpha": 0.5, "linewidths": 0, "zorder": 2}
    axis.scatter(runs[x], runs["value"], s=size, transform=place, **style)
    axis.update_datalim(runs[[x, "value"]].to_numpy())
    axis.autoscale_view()


def draw_estimates(axis, rows: pd.DataFrame, x: str, **style) -> None:
    rows = rows.sort_values(x)
    errors = [rows["estimate"] - rows["ci_low"], rows["ci_high"] - rows["estimate"]]
    axis.errorbar(rows[x], rows["estimate"], yerr=errors, elinewidth=1.0, capsize=1.5, zorder=3, **style)


def draw_band(axis, rows: pd.DataFrame, x: str, color, linestyle: str = "-") -> None:
    rows = rows.sort_values(x)
    axis.plot(rows[x], rows["estimate"], color=color, linewidth=1.0, linestyle=linestyle)
    axis.fill_between(rows[x], rows["ci_low"], rows["ci_high"], color=color, alpha=0.15, linewidth=0)


def size_axis(axis, sizes: pd.Series, label: str) -> None:
    """A log axis with a tick at each size that has room for its label."""
    axis.set_xscale("log")
    sizes = sorted({float(size) for size in sizes.dropna()})
    span = np.log(sizes[-1] / sizes[0])
    ticks = [sizes[0]]
    for size in sizes[1:]:
        if np.log(size / ticks[-1]) >= 0.16 * span:
            ticks.append(size)
    axis.set_xticks(ticks)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda size, _: human_number(size)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(label)


def signed_interval(row: pd.Series) -> str:
    return f"{row.estimate:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"


def add_headroom(axis, share: float) -> None:
    """Raise the upper limit by a share of the axis, as room for text."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + share * (high - low))


def human_number(number: float) -> str:
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def interval_caption(summary: pd.DataFrame, marks: str) -> str:
    """Seeds, prompts and kinds of interval of the summary in a sentence."""
    methods = " or ".join(sorted(summary["ci_method"].dropna().unique()))
    seeds, prompts = (_range(summary.loc[summary[column] > 1, column]) for column in ("num_seeds", "num_prompts"))
    sentence = f"{marks}95% intervals ({methods}); {seeds} seeds, {prompts} prompts."
    return sentence[0].upper() + sentence[1:]


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


@styled
def throughput(summary: pd.DataFrame) -> Figure:
    """How much faster each benchmark case is than its peer, with its interval; and its share of the peer's memory.

    Args:
        summary: ``case``, ``speed_ratio``, ``ci_low``, ``ci_high``, ``memory_ratio``.
    """
    picture = Picture(figsize=(7.5, 0.9 + 0.42 * len(summary)), layout="constrained")
    speed, memory = picture.subplots(1, 2, sharey=True)
    place = np.arange(len(summary))[::-1]
    error = [summary.speed_ratio - summary.ci_low, summary.ci_high - summary.speed_ratio]
    speed.barh(place, summary.speed_ratio, xerr=error, color="C0", height=0.6, capsize=3)
    speed.axvline(1, color="0.4", linewidth=1)
    speed.set_xlabel("times as fast as the peer")
    speed.set_yticks(place, summary.case)
    memory.barh(place, summary.memory_ratio, color="C1", height=0.6)
    memory.axvline(1, color="0.4", linewidth=1)
    memory.set_xlabel("peak memory, of the peer's")
    return picture
