"""The figure of `study_process` from its tables; conventions and helpers are those of `plots`."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfscale.study.style import (
    CATEGORIES,
    draw_dots,
    draw_estimates,
    interval_caption,
    new_figure,
    select,
    signed_interval,
    size_axis,
    styled,
)

KIND_STYLES = {"outcome": (CATEGORIES[1], "o"), "process": (CATEGORIES[0], "s")}
TITLES = {"own": "own family", "other": "other family", "both": "both families"}
"""What the reward models were trained on, as a held-out prompt sees it."""


@styled
def process_supervision(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C8: best-of-N by outcome and process reward models, by what they were trained on; step errors found.

    Args:
        runs: ``kind``, ``data``, ``family``, ``reward_model_params``, ``seed``, ``metric``, ``value``;
            ``first_error_f1`` is drawn as dots.
        summary: the common columns, ``kind``, ``trained_on``, ``data``, ``family``, ``reward_model_params``,
            ``verdict``; quantities ``best_of_n_gain`` (by kind, training data and size), ``process_minus_outcome`` (by
            training data) and ``first_error_f1`` (by size, training data and family).
    """
    whole = {row.trained_on: row for row in select(summary, "process_minus_outcome").itertuples()}
    caption = (
        f"{interval_caption(summary, 'bars: ')} Titles: training data. "
        f"Process minus outcome, mean over sizes: on its own task "
        f"{signed_interval(whole['own'])}, on the other {signed_interval(whole['other'])}, trained on both "
        f"{signed_interval(whole['both'])}. C8: {whole['own'].verdict}. F1: dots are seeds."
    )
    figure, axes, legend = new_figure(1, 4, 2.5, caption)
    gains = select(summary, "best_of_n_gain")
    for axis, (role, title) in zip(axes, TITLES.items(), strict=False):
        for kind, (color, marker) in KIND_STYLES.items():
            rows = gains[(gains["kind"] == kind) & (gains["trained_on"] == role)]
            draw_estimates(axis, rows, "reward_model_params", color=color, marker=marker)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=title)
        if axis is not axes[0]:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
        size_axis(axis, gains["reward_model_params"], "reward-model size")
    axes[0].set(ylabel="best-of-N gain in accuracy")
    found = select(summary, "first_error_f1")
    dots = runs[runs["metric"] == "first_error_f1"].merge(
        found[["reward_model", "reward_model_params"]].drop_duplicates(), on="reward_model", suffixes=("_", "")
    )
    for own, (label, linestyle) in {True: ("own", "-"), False: ("other", "--")}.items():
        for table, draw in ((dots, False), (found, True)):
            chosen = table[(table["data"] != "both") & ((table["data"] == table["family"]) == own)]
            for family, of in chosen.groupby("family"):
                color = CATEGORIES[2] if family == found["family"].iloc[0] else CATEGORIES[4]
                if draw:
                    style = {"color": color, "marker": "D", "linestyle": linestyle, "label": f"{family}, {label}"}
                    draw_estimates(axes[3], of, "reward_model_params", **style)
                else:
                    draw_dots(axes[3], of, "reward_model_params", color, size=4)
    axes[3].set(title="first error", ylabel="F1", ylim=(0, 1))
    size_axis(axes[3], found["reward_model_params"], "reward-model size")
    for axis in axes:
        axis.tick_params(axis="x", labelrotation=60)
    handles = [Line2D([], [], color=c, marker=m, label=f"{kind} supervision") for kind, (c, m) in KIND_STYLES.items()]
    lines, labels = axes[3].get_legend_handles_labels()
    handles += [Line2D([], [], color=line[0].get_color(), linestyle=line[0].get_linestyle(), label=f"F1: {name}")
                for line, name in zip(lines, labels, strict=True)]  # fmt: skip
    legend(handles, ncols=3)
    return figure
