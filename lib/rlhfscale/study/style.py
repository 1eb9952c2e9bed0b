"""What the pictures of all claims share: colours, dots with intervals, captions, and how a picture is shown.

A picture is drawn by the ``draw`` of its claim, from the tables of its result folder alone. It computes nothing but
what places ink, such as the mean of dots: numbers, intervals and verdicts are read from the tables.
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
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

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


ALGORITHMS = {
    "ppo": ("PPO", CATEGORIES[0], "s"),
    "grpo": ("GRPO", CATEGORIES[1], "o"),
    "rloo": ("RLOO", CATEGORIES[2], "D"),
}
"""Label, colour and marker of each algorithm."""


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


def doubling_axis(axis, sizes: list[float], labels: list[str] | None = None) -> None:
    """A log2 axis with a tick at each size."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, labels or [str(size) for size in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
