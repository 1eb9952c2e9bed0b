"""The figure of `study_compute` from its tables; conventions and helpers are those of `plots`."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfscale.study.style import (
    CATEGORIES,
    draw_band,
    draw_dots,
    draw_estimates,
    interval_caption,
    new_figure,
    select,
    signed_interval,
    styled,
)

SPENT_ON = {
    "pretraining": ("more documents", CATEGORIES[0], "s"),
    "pretraining, by rung": ("larger rungs", CATEGORIES[7], "o"),
    "RLHF": ("more RLHF", CATEGORIES[3], "D"),
}
"""Label, colour and marker of what compute is spent on."""
PARTS = ("labels", "reward model", "roll-outs", "reward", "evaluation", "updates")
"""What RLHF's compute goes into, in order of use."""


@styled
def compute_returns(runs: pd.DataFrame, summary: pd.DataFrame, flops: pd.DataFrame) -> Figure:
    """C10: accuracy against compute for pretraining and RLHF on one axis, and what RLHF's compute goes into.

    Args:
        runs: ``spent_on``, ``size``, ``seed``, ``metric``, ``value``; ``sampled_exact`` is drawn.
        summary: the common columns, ``spent_on``, ``size``, ``flops``, ``verdict``; quantities ``sampled_exact`` by
            size, ``slope_fit``, ``slope`` and ``slope_difference`` (one row, with the verdict).
        flops: ``spent_on``, ``size``, ``part``, ``flops``.
    """
    difference = select(summary, "slope_difference").iloc[0]
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars and bands: ')} Legend: slopes for each doubling of compute. "
        f"That of pretraining on more documents minus that of RLHF: {signed_interval(difference)}. "
        f"C10: {difference.verdict}."
    )
    figure, (left, right), legend = new_figure(1, 2, 3.0, caption)
    total = flops.groupby(["spent_on", "size"])["flops"].sum()
    sampled = runs[(runs["metric"] == "sampled_exact") & runs["spent_on"].notna()]
    handles = []
    for name, (label, color, marker) in SPENT_ON.items():
        dots = sampled[sampled["spent_on"] == name]
        draw_dots(left, dots.assign(flops=dots["size"].map(total[name])), "flops", color)
        rows = select(summary, "sampled_exact", spent_on=name)
        draw_estimates(left, rows, "flops", color=color, marker=marker, linestyle="none")
        draw_band(left, select(summary, "slope_fit", spent_on=name), "flops", color)
        slope = select(summary, "slope", spent_on=name).iloc[0]
        handles.append(Line2D([], [], color=color, marker=marker, label=f"{label}: {slope.estimate:+.4f}"))
    left.set_xscale("log")
    left.set(title="accuracy by compute", xlabel="FLOPs", ylabel="sampled exact-match accuracy")
    rlhf = flops[flops["spent_on"] == "RLHF"].pivot_table(index="size", columns="part", values="flops")[list(PARTS)]
    bottom = 0.0
    for part, color in zip(PARTS, CATEGORIES[1:7], strict=True):
        right.bar(range(len(rlhf)), rlhf[part], bottom=bottom, color=color, width=0.7, label=part)
        bottom = bottom + rlhf[part].to_numpy()
    right.set_xticks(range(len(rlhf)), [f"{size:.0f}" for size in rlhf.index])
    right.set(title="what RLHF's compute goes into", xlabel="PPO updates (labels grow alike)", ylabel="FLOPs")
    right.legend(loc="upper left")
    legend(handles, ncols=3)
    return figure
