"""The figures of `study_data` from their tables; conventions and helpers are those of `plots`."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhfscale.plots import (
    CATEGORIES,
    draw_band,
    draw_dots,
    draw_estimates,
    human_number,
    interval_caption,
    new_figure,
    select,
    size_colors,
    styled,
)
from rlhfscale.plots_sweeps import doubling_axis, signed_interval

FORM_COLORS = {"d(a - b d)": CATEGORIES[2], "d(a - b log d)": CATEGORIES[4]}
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
