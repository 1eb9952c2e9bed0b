"""The figures of `study_sweeps` from their tables; conventions and helpers are those of `plots`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from rlhfscale.study.style import (
    CATEGORIES,
    add_headroom,
    draw_band,
    draw_dots,
    draw_estimates,
    interval_caption,
    new_figure,
    select,
    signed_interval,
    size_axis,
    size_colors,
    styled,
)

ALGORITHMS = {
    "ppo": ("PPO", CATEGORIES[0], "s"),
    "grpo": ("GRPO", CATEGORIES[1], "o"),
    "rloo": ("RLOO", CATEGORIES[2], "D"),
}
"""Label, colour and marker of each algorithm."""
LADDERS = {
    "ppo, equal prompts": (CATEGORIES[0], "s", "-"),
    "ppo, equal roll-outs": (CATEGORIES[0], "^", "--"),
    "grpo, equal prompts": (CATEGORIES[1], "o", "-"),
}
"""Colour, marker and line of each ladder of responses per prompt."""


@styled
def reward_model_size(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C2: pair accuracy, gain from best-of-N and gain from PPO against the reward model's size.

    Args:
        runs: ``reward_model_params``, ``stage`` (sft | ppo), ``seed``, ``num_responses`` (N), ``metric``, ``value``;
            metrics ``pair_accuracy``, ``best_of_n_gain`` and, by stage, ``sampled_exact``.
        summary: the common columns, ``reward_model_params`` and ``verdict``; quantities ``pair_accuracy``,
            ``best_of_n_gain`` and ``ppo_gain`` by size, of each its ``_fit`` (line and band on a grid of sizes) and
            ``_slope`` (one row), and ``slope_difference`` (one row, with the verdict).
    """
    difference = select(summary, "slope_difference").iloc[0]
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars and bands: ')} Slopes are for each doubling of parameters. "
        f"Best-of-N slope minus PPO slope: {signed_interval(difference)}. C2: {difference.verdict}."
    )
    figure, axes, _ = new_figure(1, 3, 2.6, caption)
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
    for axis, color, (name, (title, label)) in zip(axes, CATEGORIES[2:5], titles.items(), strict=True):
        draw_dots(axis, dots[name], "reward_model_params", color)
        style = {"color": color, "marker": "o", "linestyle": "none"}
        draw_estimates(axis, select(summary, name), "reward_model_params", **style)
        draw_band(axis, select(summary, f"{name}_fit"), "reward_model_params", color)
        axis.set(title=title, ylabel=label)
        size_axis(axis, dots[name]["reward_model_params"], "reward-model size")
        axis.tick_params(axis="x", labelrotation=45)
        slope = select(summary, f"{name}_slope").iloc[0]
        add_headroom(axis, 0.25)
        text = f"slope {slope.estimate:+.4f}\n[{slope.ci_low:+.4f}, {slope.ci_high:+.4f}]"
        axis.text(0.03, 0.98, text, transform=axis.transAxes, va="top", fontsize=7)
    gains = axes[1:]
    low, high = min(0.0, *(axis.get_ylim()[0] for axis in gains)), max(axis.get_ylim()[1] for axis in gains)
    for axis in gains:
        axis.set_ylim(low, high)
        axis.axhline(0, color="0.4", linewidth=0.8)
    return figure


@styled
def responses_per_prompt(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C5: accuracy against responses per prompt, and what each doubling brings.

    Args:
        runs: ``ladder``, ``responses_per_prompt``, ``seed``, ``metric``, ``value``; ``sampled_exact`` is drawn.
        summary: the common columns, ``ladder``, ``responses_per_prompt``, ``stage``, ``verdict``; quantities
            ``sampled_exact`` (by ladder and size; once with stage sft), ``doubling_gain`` (by ladder and the size that
            is reached), ``first_doublings`` and ``last_minus_half_of_first`` (one row each, with the verdict).
    """
    parts = [select(summary, name).iloc[0] for name in ("first_doublings", "last_minus_half_of_first")]
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars: ')} PPO at equal prompts: "
        f"{signed_interval(parts[0])} for each of the first two doublings; the last one minus half of that: "
        f"{signed_interval(parts[1])}. C5: {parts[0].verdict}."
    )
    figure, (left, right), legend = new_figure(1, 2, 3.1, caption)
    runs = runs[runs["metric"] == "sampled_exact"]
    start = select(summary, "sampled_exact", stage="sft").iloc[0]
    left.axhline(start.estimate, color="0.4", linewidth=1.0, linestyle=":")
    right.axhline(0, color="0.4", linewidth=0.8)
    handles = [Line2D([], [], color="0.4", linestyle=":", label="SFT")]
    for index, (name, (color, marker, linestyle)) in enumerate(LADDERS.items()):
        style = {"color": color, "marker": marker}
        draw_dots(left, runs[runs["ladder"] == name], "responses_per_prompt", color, size=5)
        rows = select(summary, "sampled_exact", ladder=name)
        draw_estimates(left, rows, "responses_per_prompt", linestyle=linestyle, **style)
        rows = select(summary, "doubling_gain", ladder=name)
        beside = rows["responses_per_prompt"] * 2 ** (0.12 * (index - 1))
        draw_estimates(right, rows.assign(place=beside), "place", linestyle="none", **style)
        label = name.replace("ppo", "PPO").replace("grpo", "GRPO")
        handles.append(Line2D([], [], linestyle=linestyle, label=label, **style))
    sizes = sorted({int(size) for size in runs["responses_per_prompt"].dropna()})
    doubling_axis(left, sizes)
    doubling_axis(right, sizes[1:], [f"to {size}" for size in sizes[1:]])
    left.set(title="accuracy", xlabel="responses per prompt", ylabel="sampled exact-match accuracy")
    right.set(title="gain of each doubling", xlabel="responses per prompt, doubled", ylabel="accuracy")
    legend(handles, ncols=4)
    return figure


@styled
def algorithms(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C9: gain by algorithm at equal roll-outs, and the distance from PPO within the margin of equivalence.

    Args:
        runs: ``algorithm``, ``responses_per_prompt``, ``stage``, ``seed``, ``metric``, ``value``; the metric
            ``sampled_exact`` is drawn.
        summary: the common columns, ``algorithm``, ``responses_per_prompt``, ``margin``, ``verdict``; quantities
            ``gain`` and ``minus_ppo`` (by algorithm and size), ``minus_ppo_in_all`` (by algorithm; GRPO's has the
            verdict).
    """
    whole = select(summary, "minus_ppo_in_all")
    grpo = whole[whole["algorithm"] == "grpo"].iloc[0]
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars: ')} Shaded: differences that count as none "
        f"(margin {grpo.margin:g}). GRPO minus PPO in all: {signed_interval(grpo)}. C9: {grpo.verdict}."
    )
    figure, (left, right), legend = new_figure(1, 2, 2.9, caption)
    sampled = runs[runs["metric"] == "sampled_exact"]
    start = sampled[sampled["stage"] == "sft"].set_index("seed")["value"]
    sizes = sorted({int(size) for size in sampled["responses_per_prompt"].dropna()})
    names = [name for name in ALGORITHMS if name in set(sampled["algorithm"])]
    right.axhspan(-grpo.margin, grpo.margin, color="0.9", linewidth=0)
    for axis in (left, right):
        axis.axhline(0, color="0.4", linewidth=0.8)
    handles = []
    for index, name in enumerate(names):
        label, color, marker = ALGORITHMS[name]
        style = {"color": color, "marker": marker, "linestyle": "none"}
        handles.append(Line2D([], [], label=label, **style))
        place = {size: spot + 0.22 * (index - (len(names) - 1) / 2) for spot, size in enumerate(sizes)}
        dots = sampled[sampled["algorithm"] == name]
        dots = dots.assign(value=dots["value"] - dots["seed"].map(start), place=dots["responses_per_prompt"].map(place))
        draw_dots(left, dots, "place", color)
        rows = select(summary, "gain", algorithm=name)
        draw_estimates(left, rows.assign(place=rows["responses_per_prompt"].map(place)), "place", **style)
        if name != "ppo":
            rows = select(summary, "minus_ppo", algorithm=name)
            draw_estimates(right, rows.assign(place=rows["responses_per_prompt"].map(place)), "place", **style)
            spot = len(sizes) + 0.22 * (index - (len(names) - 1) / 2)
            draw_estimates(right, whole[whole["algorithm"] == name].assign(place=spot), "place", **style)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    right.set_xticks(range(len(sizes) + 1), [*map(str, sizes), "mean"])
    left.set(title="gain at equal roll-outs", xlabel="responses per prompt", ylabel="accuracy, trained minus SFT")
    right.set(title="distance from PPO", xlabel="responses per prompt", ylabel="accuracy, minus PPO")
    legend(handles, ncols=3)
    return figure


@styled
def learning_rates(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Accuracy above that at the common rate, against the rate: PPO by rung, and its siblings.

    Args:
        runs: not drawn.
        summary: the common columns, ``algorithm``, ``rung``, ``num_params``, ``policy_lr``; quantity ``minus_common``.
    """
    rows = select(summary, "minus_common")
    caption = (
        f"Sampled exact accuracy minus that at the common rate; bars: 95% intervals ({rows['ci_method'].iloc[0]}) "
        f"over {rows['num_prompts'].max():,} prompts, mean of the seeds. No other figure uses these seeds or prompts."
    )
    figure, (left, right), legend = new_figure(1, 2, 2.8, caption)
    ppo = rows[rows["algorithm"] == "ppo"]
    colors = size_colors(dict(zip(ppo["rung"], ppo["num_params"], strict=True)))
    handles = []
    for index, (rung, color) in enumerate(colors.items()):
        of = ppo[ppo["rung"] == rung]
        beside = of["policy_lr"] * 2 ** (0.1 * (index - (len(colors) - 1) / 2))
        draw_estimates(left, of.assign(place=beside), "place", color=color, marker="o")
        handles.append(Line2D([], [], color=color, marker="o", label=f"PPO, {rung}"))
    others = rows[(rows["algorithm"] != "ppo") | (rows["rung"].isin(rows.loc[rows["algorithm"] != "ppo", "rung"]))]
    for index, (name, of) in enumerate(others.groupby("algorithm")):
        label, color, marker = ALGORITHMS[name]
        draw_estimates(
            right, of.assign(place=of["policy_lr"] * 2 ** (0.1 * index)), "place", color=color, marker=marker
        )
        handles.append(Line2D([], [], color=color, marker=marker, label=f"{label}, {of['rung'].iloc[0]}"))
    for axis in (left, right):
        axis.axhline(0, color="0.4", linewidth=0.8)
        rates = sorted(rows["policy_lr"].unique())
        doubling_axis(axis, rates, [f"{rate:g}" for rate in rates])
        axis.set(xlabel="learning rate")
    left.set(title="PPO by rung", ylabel="accuracy, minus the common rate")
    right.set(title="algorithms")
    legend(handles, ncols=5)
    return figure


@styled
def learning_curves(metrics: pd.DataFrame) -> Figure:
    """Gold reward and KL update by update, a column for each number of responses per prompt, every seed drawn.

    Args:
        metrics: one row per run and update: ``algorithm``, ``responses_per_prompt``, ``seed``, ``update``, ``gold``
            (mean of the update's roll-outs) and ``kl_nats``.
    """
    sizes = sorted(metrics["responses_per_prompt"].unique())
    caption = (
        f"Roll-outs of training. Thin lines: {metrics['seed'].nunique()} seeds; thick lines: their mean, gold over "
        "five updates; no intervals."
    )
    figure, axes, legend = new_figure(2, len(sizes), 3.8, caption)
    axes = np.reshape(axes, (2, len(sizes)))
    names = [name for name in ALGORITHMS if name in set(metrics["algorithm"])]
    for column, size in enumerate(sizes):
        for row, (metric, window) in enumerate((("gold", 5), ("kl_nats", 1))):
            axis = axes[row, column]
            for name in names:
                chosen = metrics[(metrics["algorithm"] == name) & (metrics["responses_per_prompt"] == size)]
                table = chosen.pivot_table(index="update", columns="seed", values=metric)
                color = ALGORITHMS[name][1]
                axis.plot(table.index, table, color=color, linewidth=0.5, alpha=0.4)
                mean = table.mean(axis=1).rolling(window, min_periods=1, center=True).mean()
                axis.plot(table.index, mean, color=color, linewidth=1.6)
            axis.sharey(axes[row, 0])
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[0, column].set(title=f"{size} responses")
        axes[1, column].set(xlabel="update")
    axes[0, 0].set(ylabel="gold reward")
    axes[1, 0].set(ylabel="KL to reference (nats)")
    legend([Line2D([], [], color=ALGORITHMS[name][1], label=ALGORITHMS[name][0]) for name in names], ncols=3)
    return figure


def doubling_axis(axis, sizes: list[float], labels: list[str] | None = None) -> None:
    """A log2 axis with a tick at each size."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, labels or [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
