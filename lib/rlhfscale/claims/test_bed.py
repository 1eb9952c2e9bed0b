"""Is the laptop bed good enough to ask questions on?

The figure shows the ladder's loss against compute, the accuracy of its models after fine-tuning, and the reward
models' accuracy by size and by data, and checks the conditions that must hold before any claim is looked at.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from pydantic import model_validator
from safetensors.numpy import load_file

from rlhfscale.bed import specs, tasks
from rlhfscale.bed.demonstrations import demonstration_nats, held_out_documents
from rlhfscale.claims import c01_policy_size as c01
from rlhfscale.evals import best_of_n as bon
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_power_law, fit_with_intervals
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders, mean_where_known, read_responses, read_scores
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.tables import Runs, Tables, band_rows, new_rng, per_prompt_table


class Params(StudyFigure):
    """The conditions that the laptop bed must meet before a figure is drawn from it."""

    __test__: ClassVar[bool] = False  # not a pytest class
    figure: ClassVar[str] = "00_test_bed"
    from_scratch: ClassVar[str] = "00_test_bed measures how its rungs were pretrained"
    title: ClassVar[str] = "The laptop bed: what the ladder and the reward models can do"

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=4, doc="rungs of the ladder; a law needs four")
    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    data_rung: str = field(role="fixed", doc="reward-model rung whose data are varied, and that PPO is run with")
    data_prompts: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="labelled prompts, fewer than the recipe's"
    )
    gain_rungs: tuple[str, ...] = field(
        role="scientific", min_length=2, doc="policies trained by PPO with the data rung"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        self.settings.check_rungs("gain_rungs", self.gain_rungs)
        if self.data_rung not in self.reward_model_rungs:
            raise ValueError(f"data_rung: {self.data_rung!r} is not among reward_model_rungs")
        limit = self.settings.reward_prompts
        bad = [count for count in self.data_prompts if not 1 <= count < limit]
        if bad:
            raise ValueError(f"data_prompts: {bad} must be from 1 to below the recipe's reward_prompts = {limit}")
        return self

    def reward_models(self) -> dict[tuple[str, int, int], specs.RewardModel]:
        """By rung, number of labelled prompts and seed."""
        full = self.settings.reward_prompts
        cells = [(rung, full) for rung in self.reward_model_rungs]
        cells += [(self.data_rung, count) for count in self.data_prompts]
        return {
            (rung, count, seed): self.settings.reward_model(rung, seed, num_prompts=count)
            for rung, count in cells
            for seed in self.seeds
        }

    def best_of_eight(self, seed: int) -> tuple[specs.Samples, specs.Scores]:
        """Eight responses of the data rung's SFT model to each held-out prompt, scored by its reward model."""
        recipe = self.settings
        samples = recipe.evaluation(recipe.sft(self.data_rung), seed).changed(num_samples=8)
        return samples, recipe.scores(samples, recipe.reward_model(self.data_rung, seed))

    def gains(self) -> c01.Params:
        """The policies of the gain condition, as the figure of policy size describes them."""
        fixed = {"reward_model_rung": self.data_rung, "other_rungs": (), "other_seeds": ()}
        return c01.Params(recipe=self.recipe, seeds=self.seeds, policy_rungs=self.gain_rungs, **fixed)

    def specs(self) -> tuple[Spec, ...]:
        recipe = self.settings
        ladder_specs = [
            item
            for rung in self.policy_rungs
            for item in (
                recipe.pretrain(rung),
                recipe.evaluation(recipe.sft(rung), self.seeds[0]),
                recipe.evaluation(recipe.sft(rung), 0, greedy=True),
            )
        ]
        best = [item for seed in self.seeds for item in self.best_of_eight(seed)]
        return tuple(dict.fromkeys([*ladder_specs, *self.reward_models().values(), *best, *self.gains().specs()]))


def measure(P: Params, folders: Folders) -> Tables:
    """Loss against compute, accuracy by rung and family, reward models by size and data, and the bed's conditions."""
    rows, summary, prompts = Runs(P), [], []
    excess = _ladder_loss(P, folders, rows, prompts)
    sizes = {rung: num_params(rung) for rung in P.policy_rungs}
    flops = np.array([_last_loss(folders, P, rung)["flops"] for rung in P.policy_rungs])
    interval = bootstrap(excess, lambda means: means, unit="prompt", rng=new_rng(), on="means")
    for rung, compute, part in zip(P.policy_rungs, flops, interval.split(), strict=True):
        about = {"rung": rung, "num_params": sizes[rung], "train_flops": compute}
        summary.append(summary_row("excess_loss", part, **about))
    fit = fit_with_intervals(fit_power_law, flops, excess, unit="prompt", rng=new_rng())
    exponent = fit.intervals["b"]
    summary += band_rows("loss_fit", "train_flops", fit, exponent)
    summary.append(summary_row("loss_exponent", exponent))
    summary.append(summary_row("loss_r2", exponent) | {"estimate": fit.r2_log, "ci_low": np.nan, "ci_high": np.nan})
    accuracy = _ladder_accuracy(P, folders, rows, summary, prompts)
    pairs = _reward_model_accuracy(P, folders, rows, summary, prompts)
    best = _best_of_eight(P, folders)
    gains = c01.measure(P.gains(), folders)
    gain_rows = gains.summary[gains.summary["quantity"] == "gain"]
    conditions = _conditions(P, fit.r2_log, accuracy, pairs, best, gain_rows)
    summary += [summary_row("best_of_8_minus_mean", best, rung=P.data_rung)]
    summary += gain_rows.dropna(axis=1).to_dict("records")
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), extra={"conditions.csv": conditions})


def _ladder_loss(P: Params, folders: Folders, rows: "Runs", prompts: list) -> np.ndarray:
    """Loss above the demonstrators' own: float64 [rung, document], whose mean is in nats for each response token."""
    excess = []
    demonstrators = demonstration_nats(held_out_documents(P.settings.pretrain_slip), P.settings.pretrain_slip)
    for rung in P.policy_rungs:
        spec = P.settings.pretrain(rung)
        final = load_file(folders[spec] / "held_out.safetensors")
        values = (final["nats"] - demonstrators) / final["tokens"].mean()
        last = _last_loss(folders, P, rung)
        metrics = {"excess_loss": values.mean(), "heldout_loss": last["loss_nats"]}
        rows.add(spec, metrics, rung=rung, train_flops=last["flops"], seed=spec.seed, num_prompts=len(values))
        prompts.append(per_prompt_table(spec, spec.seed, "excess_loss", values))
        excess.append(values)
    return np.array(excess)


def _ladder_accuracy(P: Params, folders: Folders, rows: "Runs", summary: list, prompts: list) -> np.ndarray:
    """Sampled exact accuracy of the SFT rungs: float64 [rung, prompt]. Adds rows by family and by difficulty."""
    sampled_exact = []
    families = list(tasks.FAMILIES)
    for rung in P.policy_rungs:
        sft, params = P.settings.sft(rung), num_params(rung)
        for metric, seed, greedy in (("sampled_exact", P.seeds[0], False), ("greedy_exact", 0, True)):
            spec = P.settings.evaluation(sft, seed, greedy=greedy)
            responses = read_responses(folders, spec)
            exact = responses.exact.mean(1)
            groups = {("family", name): responses.family == index for index, name in enumerate(families)}
            groups |= {("difficulty", k): responses.difficulty == k for k in np.unique(responses.difficulty).tolist()}
            for (kind, name), chosen in groups.items():
                about = {"rung": rung, kind: name}
                rows.add(spec, {metric: exact[chosen].mean()}, seed=seed, num_prompts=int(chosen.sum()), **about)
                if kind == "family":
                    interval = bootstrap(exact[chosen], np.mean, unit="prompt", rng=new_rng(), on="means")
                    summary.append(summary_row(metric, interval, num_params=params, **about))
            if not greedy:
                sampled_exact.append(exact)
                prompts.append(per_prompt_table(spec, seed, metric, exact))
    return np.array(sampled_exact)


def _reward_model_accuracy(
    P: Params, folders: Folders, rows: "Runs", summary: list, prompts: list
) -> dict[tuple[str, int], Interval]:
    """Interval of the accuracy within a prompt, by rung and number of labelled prompts.

    A prompt counts where its responses have unequal gold; that depends on the responses alone, not on the model.
    """
    specs = P.reward_models()
    held_out = {cell: load_file(folders[spec] / "held_out.safetensors") for cell, spec in specs.items()}
    # the label rungs answer the same prompts, so a prompt's accuracy is the mean over those that give it a pair
    accuracy = {cell: mean_where_known(found["pair_accuracy"]) for cell, found in held_out.items()}
    counts = ~np.isnan(next(iter(accuracy.values())))
    num_pairs: dict[tuple[str, int], int] = {}
    for (rung, labelled, seed), spec in specs.items():
        values = accuracy[rung, labelled, seed][counts]
        # seeds label prompts of their own, so their numbers of pairs differ a little: name a cell by the first seed's
        pairs = num_pairs.setdefault((rung, labelled), int(held_out[rung, labelled, seed]["num_pairs"]))
        about = {"num_pairs": pairs, "labelled_prompts": labelled, "seed": seed, "num_prompts": len(values)}
        rows.add(spec, {"pairwise_accuracy": values.mean()}, rung=rung, **about)
        per_prompt = per_prompt_table(spec, seed, "pairwise_accuracy", values)
        prompts.append(per_prompt.assign(prompt_id=np.flatnonzero(counts)))
    intervals = {}
    for (rung, labelled), pairs in num_pairs.items():
        values = np.array([accuracy[rung, labelled, seed][counts] for seed in P.seeds])
        interval = intervals[rung, labelled] = nested_bootstrap(values, np.mean, rng=new_rng(), on="means")
        about = {"rung": rung, "num_params": num_params(rung), "num_pairs": pairs}
        summary.append(summary_row("pairwise_accuracy", interval, **about))
    return intervals


def _best_of_eight(P: Params, folders: Folders) -> Interval:
    """Exact accuracy of best-of-8 by the data rung's reward model minus that of one response."""
    values = []
    for seed in P.seeds:
        samples, scores = P.best_of_eight(seed)
        exact, proxy = read_responses(folders, samples).exact, read_scores(folders, scores)
        best, mean = bon.best_of_n(exact, proxy, [8])[:, 0], exact.mean(1)
        values.append(best - mean)
    return nested_bootstrap(np.array(values), np.mean, rng=new_rng(), on="means")


def _conditions(
    P: Params,
    r2: float,
    accuracy: np.ndarray,
    pairs: Mapping[tuple[str, int], Interval],
    best: Interval,
    gains: pd.DataFrame,
) -> pd.DataFrame:
    """What the bed must show before figures are drawn from it: condition, measured, threshold, met."""
    means = accuracy.mean(1)
    steps, full = np.diff(means), P.settings.reward_prompts
    by_size = [pairs[rung, full].estimate for rung in P.reward_model_rungs]
    by_data = [pairs[P.data_rung, count].estimate for count in (*sorted(P.data_prompts), full)]
    positive = int((gains["ci_low"] > 0).sum())
    joined = " -> ".join
    shown = [joined(f"{value:.2f}" for value in values) for values in (means, by_size, by_data)]
    checks = [
        (
            "loss above the demonstrators' own against compute: R2 of the power law",
            f"{r2:.3f}",
            ">= 0.95",
            r2 >= 0.95,
        ),
        ("rungs in that fit", str(len(means)), ">= 5", len(means) >= 5),
        ("sampled exact accuracy rises along the ladder", shown[0], "every step > 0", (steps > 0).all()),
        ("its rise in all", f"{means[-1] - means[0]:.3f}", ">= 0.3", means[-1] - means[0] >= 0.3),
        ("its maximum", f"{means.max():.3f}", "< 0.9", means.max() < 0.9),
        ("pair accuracy within a prompt by size", shown[1], "largest > smallest", by_size[-1] > by_size[0]),
        ("the same by data", shown[2], "every step > 0", (np.diff(by_data) > 0).all()),
        ("the same with the fewest labels is near chance", f"{by_data[0]:.3f}", "<= 0.6", by_data[0] <= 0.6),
        ("the same at its best", f"{max(by_size):.3f}", ">= 0.8", max(by_size) >= 0.8),
        (
            f"best-of-8 by the {P.data_rung} reward model minus the mean",
            f"{best.estimate:.3f} [{best.low:.3f}, {best.high:.3f}]",
            "interval > 0",
            best.low > 0,
        ),
        ("rungs whose gain from PPO has an interval above 0", str(positive), ">= 3", positive >= 3),
        ("seeds of every reward model and policy", str(len(P.seeds)), ">= 5", len(P.seeds) >= 5),
    ]
    return pd.DataFrame(checks, columns=["condition", "measured", "threshold", "met"])


def _last_loss(folders: Folders, P: Params, rung: str) -> dict[str, float]:
    return pd.read_csv(folders[P.settings.pretrain(rung)] / "loss.csv").iloc[-1].to_dict()


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The laptop ladder: loss against compute, accuracy against size, reward models against size and data.

    Args:
        runs: ``rung``, ``num_params``, ``train_flops``, ``family``, ``num_pairs``, ``seed``, ``metric``, ``value``
            (cells that do not apply are empty). Metrics: ``excess_loss``, held-out loss above the demonstrators'
            own (by ``train_flops``), ``sampled_exact`` and ``greedy_exact`` (by ``num_params`` and ``family``),
            ``pairwise_accuracy`` (by the reward model's ``rung``, ``num_params`` and ``num_pairs``).
        summary: the common columns and those of ``runs``; the same quantities, and ``loss_fit`` (curve and band on a
            grid of ``train_flops``), ``loss_exponent`` and ``loss_r2`` (one row each).
    """
    dots_caption = style.interval_caption(summary, "dots: seeds; bars and band: ")
    figure, ((loss, accuracy), (by_size, by_pairs)), legend = style.new_figure(2, 2, 5.0, dots_caption)
    ladder = runs.dropna(subset=["num_params"])
    colors = style.size_colors(dict(zip(ladder["rung"], ladder["num_params"], strict=True)))

    _draw_loss(loss, runs, summary, colors)
    _draw_accuracy(accuracy, runs, summary)
    _draw_reward_models(by_size, by_pairs, runs, summary, colors)
    sizes = dict(zip(ladder["rung"], ladder["num_params"], strict=True))
    legend(
        [Line2D([], [], color=c, marker="o", label=f"{n} ({style.human_number(sizes[n])})") for n, c in colors.items()]
    )
    return figure


def _draw_loss(loss: Axes, runs: pd.DataFrame, summary: pd.DataFrame, colors: Mapping[str, tuple]) -> None:
    """Held-out loss above the demonstrators' own against compute, with the fitted power law."""
    points = style.select(summary, "excess_loss")
    seeds = runs[runs["metric"] == "excess_loss"]
    style.draw_band(loss, style.select(summary, "loss_fit"), "train_flops", "0.35", linestyle="--")
    for row in points.itertuples():
        style.draw_dots(loss, seeds[seeds["rung"] == row.rung], "train_flops", colors[row.rung])
        style.draw_estimates(
            loss, points[points["rung"] == row.rung], "train_flops", color=colors[row.rung], marker="o"
        )
    exponent, r2 = style.select(summary, "loss_exponent").iloc[0], style.select(summary, "loss_r2").iloc[0]
    text = f"exponent {exponent.estimate:.2f} [{exponent.ci_low:.2f}, {exponent.ci_high:.2f}]\nR² = {r2.estimate:.3f}"
    loss.text(0.97, 0.97, text, transform=loss.transAxes, ha="right", va="top", fontsize=7)
    loss.set(xscale="log", yscale="log", title="(a) loss against compute", xlabel="pretraining compute (FLOPs)")
    loss.set_ylabel("excess loss (nats/token)")
    low, high = loss.get_ylim()
    ticks = [t for power in range(-4, 2) for t in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= t <= high]
    loss.set_yticks(ticks, [f"{t:g}" for t in ticks])
    loss.yaxis.set_minor_formatter(NullFormatter())


def _draw_accuracy(accuracy: Axes, runs: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Sampled and greedy accuracy of the fine-tuned rungs by task family."""
    families = sorted(style.select(summary, "sampled_exact")["family"].unique())
    for family, color in zip(families, style.CATEGORIES, strict=False):
        for metric, linestyle, marker in (("sampled_exact", "-", "o"), ("greedy_exact", "--", "^")):
            chosen = runs[(runs["metric"] == metric) & (runs["family"] == family)]
            style.draw_dots(accuracy, chosen, "num_params", color, size=4)
            rows = style.select(summary, metric, family=family)
            label = f"{family}, {metric.removesuffix('_exact')}"
            style.draw_estimates(
                accuracy, rows, "num_params", color=color, linestyle=linestyle, marker=marker, label=label
            )
    accuracy.set(title="(b) accuracy of SFT", ylabel="exact-match accuracy")
    style.size_axis(accuracy, style.select(summary, "sampled_exact")["num_params"], "policy parameters")
    style.add_headroom(accuracy, 0.25 * len(families))
    accuracy.set_yticks([t for t in accuracy.get_yticks() if 0 <= t <= 1])
    accuracy.legend(loc="upper left", handlelength=2.4, borderpad=0, labelspacing=0.25)


def _draw_reward_models(
    by_size: Axes, by_pairs: Axes, runs: pd.DataFrame, summary: pd.DataFrame, colors: Mapping[str, tuple]
) -> None:
    """Accuracy of reward models within a prompt: by size with all labels, and by the number of labelled pairs."""
    pairwise = style.select(summary, "pairwise_accuracy")
    pair_dots = runs[runs["metric"] == "pairwise_accuracy"]
    full = pairwise["num_pairs"].max()
    top = pairwise[pairwise["num_pairs"] == full]
    style.draw_estimates(by_size, top, "num_params", color="0.35", marker="")
    for name in top["rung"]:
        chosen = (pair_dots["rung"] == name) & (pair_dots["num_pairs"] == full)
        style.draw_dots(by_size, pair_dots[chosen], "num_params", colors[name])
        style.draw_estimates(by_size, top[top["rung"] == name], "num_params", color=colors[name], marker="o")
    by_size.set(title=f"(c) reward model, {style.human_number(full)} pairs", ylabel="within-prompt pair accuracy")
    style.size_axis(by_size, top["num_params"], "reward-model parameters")

    swept = [name for name, rows in pairwise.groupby("rung") if rows["num_pairs"].nunique() > 1]
    for name in (name for name in colors if name in swept):
        style.draw_dots(by_pairs, pair_dots[pair_dots["rung"] == name], "num_pairs", colors[name])
        rows = pairwise[pairwise["rung"] == name]
        style.draw_estimates(by_pairs, rows, "num_pairs", color=colors[name], marker="o")
    by_pairs.set(title="(d) reward model by data", ylabel="within-prompt pair accuracy")
    style.size_axis(by_pairs, pairwise[pairwise["rung"].isin(swept)]["num_pairs"], "labelled pairs")
    for axis in (by_size, by_pairs):
        axis.axhline(0.5, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_ylim(min(0.45, pair_dots["value"].min() - 0.03), 1.0)
