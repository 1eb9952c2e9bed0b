"""The figures of `study_data` from their tables; conventions and helpers are those of `plots`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfscale.study.plots_sweeps import doubling_axis
from rlhfscale.study.style import (
    CATEGORIES,
    draw_band,
    draw_dots,
    draw_estimates,
    human_number,
    interval_caption,
    new_figure,
    select,
    signed_interval,
    size_colors,
    styled,
)

FORM_COLORS = {"d(a - b d)": CATEGORIES[2], "d(a - b log d)": CATEGORIES[4]}
KIND_COLORS = {
    "share_preference": ("preference", CATEGORIES[0]),
    "share_rejection_sampling": ("rejection sampling", CATEGORIES[1]),
    "share_process": ("process", CATEGORIES[2]),
}
"""Label and colour of each kind of label, by the column of its share."""
ROOT_KL = "KL to reference (nats, sqrt axis)"


@styled
def training_data(runs: pd.DataFrame, summary: pd.DataFrame, training: pd.DataFrame) -> Figure:
    """C3: accuracy against training prompts with its fitted saturation, and gold and proxy against KL.

    Args:
        runs: ``training_prompts``, ``stage`` (sft | ppo), ``kl_coefficient`` (of the weakly held runs alone), ``seed``,
            ``metric``, ``value``; the metric ``sampled_exact`` is drawn.
        summary: the common columns, ``training_prompts``, ``form``, ``root_kl``, ``verdict``; quantities
            ``sampled_exact``, ``saturation_fit``, ``saturated_at_prompts``, ``first_quarter``,
            ``rest_minus_half_of_first``, ``over_optimisation_fit`` and ``over_optimisation_r2``.
        training: one row per run and update: ``kl_coefficient``, ``seed``, ``kl_nats``, ``gold_sd``, ``proxy_sd``.
    """
    first, rest = (select(summary, name).iloc[0] for name in ("first_quarter", "rest_minus_half_of_first"))
    reached = select(summary, "saturated_at_prompts").iloc[0]
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars and bands: ')} First quarter of the data: "
        f"{signed_interval(first)}; the rest minus half of that: {signed_interval(rest)}. C3: {first.verdict}. "
        f"Fitted: 95% of the rise at {human_number(reached.estimate)} prompts [{human_number(reached.ci_low)}, "
        f"{human_number(reached.ci_high)}]. Right: roll-outs of training, mean over seeds."
    )
    figure, (left, right), legend = new_figure(1, 2, 3.1, caption)
    color = CATEGORIES[0]
    sampled = runs[(runs["metric"] == "sampled_exact") & runs["kl_coefficient"].isna()]
    start = sampled.loc[sampled["stage"] == "sft", "value"].mean()
    left.axhline(start, color="0.4", linestyle=":", linewidth=1.0)
    draw_dots(left, sampled[sampled["stage"] != "sft"], "training_prompts", color)
    rows = select(summary, "sampled_exact")
    rows = rows[rows["training_prompts"].notna()]
    draw_estimates(left, rows, "training_prompts", color=color, marker="s", linestyle="none")
    fit = select(summary, "saturation_fit")
    draw_band(left, fit[fit["training_prompts"] > 0], "training_prompts", color)
    sizes = sorted(rows["training_prompts"].astype(int))
    doubling_axis(left, sizes, [human_number(size) for size in sizes])
    left.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    left.set(title="accuracy", xlabel="training prompts, each seen once", ylabel="sampled exact-match accuracy")
    left.tick_params(axis="x", labelrotation=45)

    weak = training["kl_coefficient"].min()
    for coefficient, runs_of in training.groupby("kl_coefficient"):
        width = 1.6 if coefficient == weak else 0.9
        for name, linestyle in (("gold_sd", "-"), ("proxy_sd", "--")):
            means = runs_of.groupby("update")[["kl_nats", name]].mean()
            smooth = means.rolling(5, min_periods=1, center=True).mean()
            shade = CATEGORIES[0] if coefficient == weak else "0.5"
            right.plot(np.sqrt(smooth["kl_nats"].clip(lower=0)), smooth[name], linestyle, color=shade, linewidth=width)
    handles = []
    for form, shade in FORM_COLORS.items():
        draw_band(right, select(summary, "over_optimisation_fit", form=form), "root_kl", shade)
        fit_quality = select(summary, "over_optimisation_r2", form=form).iloc[0].estimate
        handles.append(Line2D([], [], color=shade, label=f"gold: {form}, R2 {fit_quality:.2f}"))
    right.axhline(0, color="0.4", linewidth=0.8)
    ticks = [kl for kl in (0.0, 0.1, 0.5, 1, 2, 4, 8, 16, 32) if kl <= training["kl_nats"].max() * 1.1]
    right.set_xticks(np.sqrt(ticks), [f"{kl:g}" for kl in ticks])
    right.set(title="over-optimisation", xlabel=ROOT_KL, ylabel="above the start (s.d. of responses)")
    kinds = [
        Line2D([], [], color=CATEGORIES[0], label=f"gold, KL coefficient {weak:g}"),
        Line2D([], [], color=CATEGORIES[0], linestyle="--", label="its proxy"),
        Line2D([], [], color="0.5", label=f"gold, KL coefficient {training['kl_coefficient'].max():g}"),
    ]
    legend([Line2D([], [], color="0.4", linestyle=":", label="SFT"), *kinds, *handles], ncols=3)
    return figure


@styled
def prompts_or_responses(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C4: the grid of reward models, and their accuracy along diagonals of equal labels.

    Args:
        runs: ``labels``, ``responses_per_prompt``, ``seed``, ``metric``, ``value``; ``pair_accuracy`` is drawn.
        summary: the common columns, ``labels``, ``responses_per_prompt``, ``labelled_prompts``, ``verdict``;
            quantities ``pair_accuracy`` by cell and its ``_prompts``, ``_responses`` and ``_difference`` (one row each,
            the last with the verdict).
    """
    rows = select(summary, "pair_accuracy")
    effects = {
        name: select(summary, f"pair_accuracy_{name}").iloc[0] for name in ("prompts", "responses", "difference")
    }
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars: ')} A doubling of prompts brings "
        f"{signed_interval(effects['prompts'])}, of responses {signed_interval(effects['responses'])}; difference "
        f"{signed_interval(effects['difference'])}. C4: {effects['difference'].verdict}."
    )
    figure, (left, right), legend = new_figure(1, 2, 2.9, caption)
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
    left.set_yticks(np.arange(len(prompts)) + 0.5, [human_number(count) for count in prompts])
    left.set(title="within-prompt accuracy", xlabel="responses per prompt", ylabel="prompts")
    figure.colorbar(picture, ax=left, shrink=0.9)
    colors = size_colors({f"{labels:.0f}": labels for labels in sorted(rows["labels"].unique())})
    dots = runs[runs["metric"] == "pair_accuracy"]
    for labels, color in colors.items():
        draw_dots(right, dots[dots["labels"] == int(labels)], "responses_per_prompt", color, size=5)
        of = rows[rows["labels"] == int(labels)]
        draw_estimates(right, of, "responses_per_prompt", color=color, marker="o")
    doubling_axis(right, [int(size) for size in sizes])
    right.set(title="at equal labels", xlabel="responses per prompt", ylabel="within-prompt accuracy")
    named = [Line2D([], [], color=c, marker="o", label=f"{human_number(int(n))} labels") for n, c in colors.items()]
    legend(named, ncols=len(named))
    return figure


@styled
def data_composition(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C7: the mixes as points of a triangle, coloured by what their reward models reach; and each kind by budget.

    Args:
        runs: ``share_preference``, ``share_rejection_sampling``, ``share_process``, ``labelled_prompts``, ``seed``,
            ``metric``, ``value``; ``best_of_n_gain`` is drawn as dots.
        summary: the common columns, the shares, ``labelled_prompts``, ``contrast``, ``verdict``; quantities
            ``pair_accuracy``, ``best_of_n_gain`` (by mix and budget), ``ppo_gain`` (by mix) and ``contrast``.
    """
    contrasts = select(summary, "contrast")
    said = "; ".join(f"{row.contrast} {signed_interval(row)}" for row in contrasts.itertuples())
    caption = (
        f"{interval_caption(summary, 'dots: seeds; bars: ')} Best-of-N at the larger budget (98.3% intervals): {said}. "
        f"C7: {contrasts.iloc[0].verdict}."
    )
    figure, axes, legend = new_figure(2, 2, 4.6, caption)
    largest = summary["labelled_prompts"].max()
    titles = {"pair_accuracy": "within-prompt accuracy", "best_of_n_gain": "best-of-N gain", "ppo_gain": "PPO gain"}
    for axis, (name, title) in zip(axes.flat, titles.items(), strict=False):
        rows = select(summary, name)
        _triangle(figure, axis, rows[rows["labelled_prompts"] == largest], title)
    axis, handles = axes[1, 1], []
    gains, dots = select(summary, "best_of_n_gain"), runs[runs["metric"] == "best_of_n_gain"]
    for index, (share, (label, color)) in enumerate(KIND_COLORS.items()):
        beside = 2 ** (0.12 * (index - 1))
        for table, draw in ((dots, draw_dots), (gains, draw_estimates)):
            alone = table[table[share] == 1.0]
            alone = alone.assign(place=alone["labelled_prompts"] * beside)
            if draw is draw_dots:
                draw_dots(axis, alone, "place", color, size=5)
            else:
                draw_estimates(axis, alone, "place", color=color, marker="o")
        handles.append(Line2D([], [], color=color, marker="o", label=f"{label} alone"))
    budgets = sorted(gains["labelled_prompts"].astype(int).unique())
    doubling_axis(axis, budgets, [human_number(count) for count in budgets])
    axis.set(title="each kind by budget", xlabel="labelled prompts", ylabel="best-of-N gain in accuracy")
    legend(handles, ncols=3)
    return figure


def _triangle(figure: Figure, axis, rows: pd.DataFrame, title: str) -> None:
    """Points in a triangle whose corners are the kinds, coloured and labelled by their estimates."""
    corners = dict(zip(KIND_COLORS, ((0.0, 0.0), (1.0, 0.0), (0.5, np.sqrt(0.75))), strict=True))
    x, y = (sum(rows[share] * corner[i] for share, corner in corners.items()) for i in (0, 1))
    edge = np.array([*corners.values(), (0.0, 0.0)])
    axis.plot(edge[:, 0], edge[:, 1], color="0.6", linewidth=0.8, zorder=1)
    picture = axis.scatter(x, y, c=rows["estimate"], cmap="viridis", s=60, zorder=2)
    for place in zip(x, y, rows["estimate"], strict=True):
        axis.annotate(f"{place[2]:.3f}", place[:2], (0, 6), textcoords="offset points", ha="center", fontsize=6)
    for share, (label, _) in KIND_COLORS.items():
        at, top = corners[share], share == "share_process"
        offset = (0, 14) if top else (0, -12)
        axis.annotate(label, at, offset, textcoords="offset points", ha="center", fontsize=7)
    axis.set(title=title, xlim=(-0.25, 1.25), ylim=(-0.2, 1.15), aspect="equal")
    axis.axis("off")
    axis.set_title(title)
    figure.colorbar(picture, ax=axis, shrink=0.7)
