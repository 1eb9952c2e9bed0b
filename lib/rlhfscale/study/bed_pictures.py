"""The pictures of the test bed: what the ladder and its reward models can do, and what RLHF changes."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from rlhfscale.study import style

BEFORE, AFTER = style.CATEGORIES[7], style.CATEGORIES[0]


@style.styled
def draw_bed(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Loss, accuracy before and after PPO, reward models by size and labels, best-of-N, over-optimisation.

    Args:
        runs: ``rung``, ``num_params``, ``stage``, ``temperature``, ``seed``, ``metric``, ``value`` and the columns of
            the summary; the metrics ``excess_loss``, ``accuracy`` and ``pair_accuracy`` are drawn.
        summary: the common columns; quantities ``excess_loss``, ``loss_fit``, ``loss_exponent``, ``loss_r2`` (by
            ``train_flops``), ``accuracy`` (by ``stage``, ``temperature``), ``pair_accuracy`` (by ``num_params``,
            ``labelled_prompts``), ``best_of_n`` (by ``reward_model``, ``num_responses``), ``pass_at_k`` (by ``rung``,
            ``num_responses``), ``weak_kl_exact`` and ``weak_kl_proxy`` (by ``updates``).
    """
    caption = style.interval_caption(summary, "dots: seeds; bars and bands: ")
    figure, axes, legend = style.new_figure(3, 2, 7.2, caption)
    ladder = summary[summary["quantity"] == "excess_loss"]
    sizes = dict(zip(ladder["rung"], ladder["num_params"], strict=True))
    colors = style.size_colors(sizes)
    (loss, accuracy), (by_size, by_labels), (chosen, held) = axes
    _draw_loss(loss, runs, summary, colors)
    _draw_accuracy(accuracy, runs, summary)
    _draw_reward_models(by_size, by_labels, runs, summary, colors)
    _draw_chosen(chosen, summary, colors)
    _draw_over_optimisation(held, summary)
    handles = [
        Line2D([], [], color=c, marker="o", label=f"{n} ({style.human_number(sizes[n])})") for n, c in colors.items()
    ]
    legend(handles)
    return figure


def _draw_loss(axis: Axes, runs: pd.DataFrame, summary: pd.DataFrame, colors: Mapping[str, tuple]) -> None:
    points = style.select(summary, "excess_loss")
    bases = runs[runs["metric"] == "excess_loss"]
    style.draw_band(axis, style.select(summary, "loss_fit"), "train_flops", "0.35", linestyle="--")
    for rung, rows in points.groupby("rung"):
        style.draw_dots(axis, bases[bases["rung"] == rung], "train_flops", colors[rung])
        style.draw_estimates(axis, rows, "train_flops", color=colors[rung], marker="o")
    exponent, r2 = style.select(summary, "loss_exponent").iloc[0], style.select(summary, "loss_r2").iloc[0]
    text = f"exponent {exponent.estimate:.2f} [{exponent.ci_low:.2f}, {exponent.ci_high:.2f}]\nR² = {r2.estimate:.3f}"
    axis.text(0.97, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=7)
    axis.set(xscale="log", yscale="log", title="(a) loss against compute", xlabel="pretraining compute (FLOPs)")
    axis.set_ylabel("excess loss (nats/token)")
    low, high = axis.get_ylim()
    ticks = [t for power in range(-4, 2) for t in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_accuracy(axis: Axes, runs: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Sampled and greedy, before and after; the grey band spans the temperatures of the SFT model."""
    cooled = style.select(summary, "accuracy", stage="sft").groupby("num_params")["estimate"].agg(["min", "max"])
    axis.fill_between(cooled.index, cooled["min"], cooled["max"], color="0.85", linewidth=0, label="SFT, T from 0 to 1")
    dots = runs[runs["metric"] == "accuracy"]
    for stage, color, name in (("sft", BEFORE, "SFT"), ("ppo", AFTER, "PPO")):
        for temperature, marker, linestyle, decoding in ((1.0, "o", "-", "sampled"), (0.0, "^", "--", "greedy")):
            chosen = (dots["stage"] == stage) & (dots["temperature"] == temperature)
            style.draw_dots(axis, dots[chosen], "num_params", color, size=4)
            rows = style.select(summary, "accuracy", stage=stage, temperature=temperature)
            label = f"{name}, {decoding}"
            style.draw_estimates(axis, rows, "num_params", color=color, marker=marker, linestyle=linestyle, label=label)
    axis.set(title="(b) before and after PPO", ylabel="exact-match accuracy")
    style.size_axis(axis, dots["num_params"], "policy parameters")
    style.add_headroom(axis, 0.5)
    axis.legend(loc="upper left", ncols=2, handlelength=2.2, borderpad=0, labelspacing=0.25, columnspacing=1.0)


def _draw_reward_models(
    by_size: Axes, by_labels: Axes, runs: pd.DataFrame, summary: pd.DataFrame, colors: Mapping[str, tuple]
) -> None:
    rows = style.select(summary, "pair_accuracy")
    dots = runs[runs["metric"] == "pair_accuracy"]
    full = rows["labelled_prompts"].mode()[0]  # the number that all rungs have
    top, top_dots = rows[rows["labelled_prompts"] == full], dots[dots["labelled_prompts"] == full]
    style.draw_estimates(by_size, top, "num_params", color="0.35", marker="")
    for rung in top["rung"]:
        style.draw_dots(by_size, top_dots[top_dots["rung"] == rung], "num_params", colors[rung])
        style.draw_estimates(by_size, top[top["rung"] == rung], "num_params", color=colors[rung], marker="o")
    by_size.set(title="(c) reward models by size")
    style.size_axis(by_size, top["num_params"], "reward-model parameters")
    for rung, swept in rows.groupby("rung"):
        if len(swept) > 1:
            style.draw_dots(by_labels, dots[dots["rung"] == rung], "labelled_prompts", colors[rung])
            style.draw_estimates(by_labels, swept, "labelled_prompts", color=colors[rung], marker="o")
            style.size_axis(by_labels, swept["labelled_prompts"], "labelled prompts")
            by_labels.set_title("(d) reward models by labels")
    for axis in (by_size, by_labels):
        axis.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set(ylabel="accuracy within a prompt", ylim=(min(0.45, dots["value"].min() - 0.03), 1.0))


def _draw_chosen(axis: Axes, summary: pd.DataFrame, colors: Mapping[str, tuple]) -> None:
    """Best-of-N by the reward models that chose, and pass@k as the ceiling."""
    for rung, rows in style.select(summary, "pass_at_k").groupby("rung"):
        rows = rows.sort_values("num_responses")
        axis.plot(rows["num_responses"], rows["estimate"], color=colors[rung], linestyle=":")
    for rung, rows in style.select(summary, "best_of_n").groupby("reward_model"):
        style.draw_estimates(axis, rows, "num_responses", color=colors[rung], marker="o")
    sizes = sorted(summary["num_responses"].dropna().astype(int).unique())
    style.doubling_axis(axis, sizes[::2], [str(size) for size in sizes[::2]])
    axis.set(title="(e) best-of-N, pass@N (dotted)", xlabel="N responses", ylabel="exact-match accuracy")
    axis.set_ylim(0, 1)


def _draw_over_optimisation(axis: Axes, summary: pd.DataFrame) -> None:
    """The right answers, and the score, of policies with a weak KL penalty."""
    style.draw_estimates(
        axis, style.select(summary, "weak_kl_exact"), "updates", color=AFTER, marker="s", label="accuracy"
    )
    axis.set(title="(f) weak KL penalty, few labels", xlabel="PPO updates", ylabel="accuracy in training")
    proxy = axis.twinx()
    proxy.grid(False)
    color = style.CATEGORIES[3]
    style.draw_estimates(
        proxy, style.select(summary, "weak_kl_proxy"), "updates", color=color, marker="o", label="score"
    )
    proxy.spines["right"].set_visible(True)
    proxy.set_ylabel("reward model's score (s.d.)")
    handles = [line for one in (axis, proxy) for line in one.get_legend_handles_labels()[0]]
    for one in (axis, proxy):
        style.add_headroom(one, 0.25)
    axis.legend(handles, ["accuracy", "score"], loc="upper center", ncols=2, columnspacing=1.0)


@style.styled
def draw_habits(summary: pd.DataFrame) -> Figure:
    """Share of steps that follow the right rule, by operation, before and after PPO, and among the demonstrators.

    Args:
        summary: quantity ``right_rule`` with the columns ``operation``, ``stage``, ``demonstrators``.
    """
    rows = style.select(summary, "right_rule")
    caption = (
        "Share of steps that follow the right rule, among those that follow the right or the wrong one, "
        "before (grey) and after PPO (blue). Ticks: share of the demonstrators who follow the right rule. "
    ) + style.interval_caption(rows, "")
    order = rows[rows["stage"] == "sft"].sort_values(["demonstrators", "operation"], ascending=[False, True])
    order = order["operation"].tolist()  # whatever the order of the table's rows
    figure, axis, legend = style.new_figure(1, 1, 0.18 * len(order) + 0.9, caption)
    place = {name: len(order) - index for index, name in enumerate(order)}
    for stage, color, marker in (("sft", BEFORE, "o"), ("ppo", AFTER, "s")):
        of = rows[rows["stage"] == stage]
        style.draw_across(axis, of, of["operation"].map(place), color, marker)
    shares = rows.drop_duplicates("operation")
    axis.scatter(shares["demonstrators"], shares["operation"].map(place), marker="|", s=60, color="black", zorder=4)
    axis.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axis.set_yticks(list(place.values()), list(place))
    axis.set(xlim=(0, 1), xlabel="share of the right rule", title="What PPO changes: the rule that is followed")
    legend([
        Line2D([], [], color=BEFORE, marker="o", linestyle="none", label="SFT"),
        Line2D([], [], color=AFTER, marker="s", linestyle="none", label="after PPO"),
        Line2D([], [], color="black", marker="|", linestyle="none", label="demonstrators"),
    ])  # fmt: skip
    return figure
