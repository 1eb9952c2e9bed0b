"""Does RLHF return less for each doubling of compute than pretraining? (claim C10)

Compute is counted in floating-point operations (FLOPs): those of pretraining, and those of everything that RLHF needs
(labels, reward model, roll-outs and updates). The claim compares the accuracy that each doubling of either brings.
"""

from functools import partial
from itertools import product
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.bed import flops as stage_flops
from rlhfscale.bed import specs
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import MIN_POINTS, fit_power_law, fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, band_rows, mean_intervals, new_rng


class Params(OnePolicy):
    """Policies of one rung with more and more compute, which is spent on pretraining or on RLHF."""

    figure: ClassVar[str] = "10_pretraining_vs_rlhf"
    from_scratch: ClassVar[str] = "10_pretraining_vs_rlhf pretrains its rungs on different numbers of documents"
    title: ClassVar[str] = "RLHF returns less for each doubling of compute than pretraining"
    claims: ClassVar[tuple[str, ...]] = ("C10",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    documents: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="pretraining documents, each a doubling of the last"
    )
    updates: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="PPO updates, each about twice the last; labels grow with them"
    )
    ladder_rungs: tuple[str, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="rungs with the recipe's documents, for pretraining by size"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("ladder_rungs", self.ladder_rungs)
        for name in ("documents", "updates"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"{name}: {list(values)} must rise, from at least 1")
        if self.documents[0] < 64:
            raise ValueError(f"documents: {self.documents[0]} is below 64, one batch")
        return self

    def pretrained(self, documents: int) -> specs.SFT:
        """Return the SFT model of the policy's rung after pretraining on that many documents."""
        sft = self.settings.sft(self.policy_rung)
        return sft.changed(base=sft.base.changed(num_documents=documents))

    def pretraining(self) -> dict[str, dict[int, specs.SFT]]:
        """Return the SFT models without RLHF: by pretraining documents, and by parameters of the rung."""
        return {
            "pretraining": {size: self.pretrained(size) for size in self.documents},
            "pretraining, by rung": {num_params(name): self.settings.sft(name) for name in self.ladder_rungs},
        }

    def policy(self, updates: int, seed: int) -> specs.Policy:
        """Return a policy whose updates and reward-model labels grow together, in the recipe's ratio."""
        recipe = self.settings
        parts = recipe.label_parts
        share = max(1, round(recipe.reward_prompts * updates / recipe.ppo_updates / parts))
        reward_model = recipe.reward_model(self.reward_model_rung, seed)
        data = tuple(part.changed(num_prompts=share) for part in reward_model.data)
        reward_model = reward_model.changed(data=data, num_prompts=share * parts)
        policy = recipe.policy(self.policy_rung, self.reward_model_rung, seed)
        start = recipe.sft(self.policy_rung)  # the same base as that of the pretraining curve
        return policy.changed(sft=start, reward_model=reward_model, num_updates=updates)

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.updates, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        models = [model for by_size in self.pretraining().values() for model in by_size.values()]
        sampled = [self.settings.evaluation(model, seed) for model in models for seed in self.seeds]
        counted = [model.base for model in models]  # their compute is read from their folders
        counted += [part for policy in self.policies() for part in policy.reward_model.data]
        return tuple(dict.fromkeys([*super().specs(), *models, *sampled, *counted]))


CLAIM = register(
    Claim(
        id="C10",
        statement="RLHF returns less for each doubling of compute than pretraining",
        paper="",
        statistic=(
            "sampled exact accuracy gained for each doubling of compute, by a line over the log of FLOPs, one "
            "policy rung: of pretraining on more documents minus that of RLHF, whose labels, reward model, "
            "roll-outs and updates grow together and all count"
        ),
        rule=Rule((Part("pretraining minus RLHF", "above"), Part("pretraining", "above", premise=True))),
    )
)


def measure(P: Params, made: Folders) -> Tables:
    """Return accuracy by compute for pretraining and for RLHF, and the slopes for each doubling of compute.

    The further table flops.csv holds the compute of every model, by what it is spent on.
    """
    found = Collector(P, made)
    costs = pd.DataFrame(_pretraining_costs(P, made) + _rlhf_costs(P, made))
    flops = costs.groupby(["spent_on", "size"], sort=False)["flops"].sum()
    accuracy = {}  # by what compute is spent on, float64 [size, seed, prompt]
    for name, models in P.pretraining().items():
        accuracy[name] = np.array([_sampled(P, found, model, name, size) for size, model in models.items()])
    trained = [found.after([P.policy(n, seed) for seed in P.seeds], spent_on="RLHF", size=n) for n in P.updates]
    accuracy["RLHF"] = np.array(trained)
    for name, values in accuracy.items():
        about, x = {"spent_on": name}, flops[name].to_numpy()
        for (size, place), interval in zip(flops[name].items(), mean_intervals(values).split(), strict=True):
            found.summary.append(summary_row("sampled_exact", interval, **about, size=size, flops=place))
        slope = nested_bootstrap(values, partial(slope_per_doubling, x), rng=new_rng(), on="means")
        found.summary.append(summary_row("slope", slope, **about))
        fit = fit_with_intervals(fit_slope, x, values, rng=new_rng())
        found.summary += [row | about for row in band_rows("slope_fit", "flops", fit, slope)]
        error = fit_with_intervals(fit_power_law, x, 1 - values, rng=new_rng())
        found.summary.append(summary_row("error_exponent", error.intervals["b"], **about, r2=error.r2_log))
    compared = ("pretraining", "RLHF")
    axes, values = [flops[name].to_numpy() for name in compared], tuple(accuracy[name] for name in compared)
    parts = nested_bootstrap(values, partial(_compared, axes), rng=new_rng(), on="means").split()
    result = CLAIM.judge(dict(zip(CLAIM.rule.intervals, parts, strict=True)))
    found.summary.append(summary_row("slope_difference", parts[0]) | {"verdict": result.verdict})
    return found.tables(result, extra={"flops.csv": costs})


def _compared(axes: list[np.ndarray], means: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Slope of pretraining minus that of RLHF, and the slope of pretraining alone."""
    pretraining, rlhf = (slope_per_doubling(x, y) for x, y in zip(axes, means, strict=True))
    return np.array([pretraining - rlhf, pretraining])


def _sampled(P: Params, found: Collector, model: specs.SFT, spent_on: str, size: int) -> list[np.ndarray]:
    """Accuracy of a model without RLHF, for each seed of the evaluation float64 [prompt]; adds its rows."""
    about = {"rung": model.rung, "stage": "sft", "spent_on": spent_on, "size": size}
    return [found.sampled(P.settings.evaluation(model, seed), seed, **about) for seed in P.seeds]


def _pretraining_costs(P: Params, made: Folders) -> list[dict[str, Any]]:
    return [
        {"spent_on": spent_on, "size": size, "part": "pretraining"}
        | {"flops": pd.read_csv(made[model.base] / "loss.csv")["flops"].iloc[-1]}
        for spent_on, models in P.pretraining().items()
        for size, model in models.items()
    ]


def _rlhf_costs(P: Params, made: Folders) -> list[dict[str, Any]]:
    """FLOPs by part, mean over seeds: sampling what is labelled, the reward model, and all of PPO."""
    rows = []
    for size in P.updates:
        parts = []
        for policy in (P.policy(size, seed) for seed in P.seeds):
            model = policy.reward_model
            labels = sum(stage_flops.samples_flops(source, made) for source in model.data)
            training = stage_flops.reward_model_flops(model, made)
            parts.append({"labels": labels, "reward model": training} | stage_flops.policy_flops(policy, made))
        means = pd.DataFrame(parts).mean()
        rows += [{"spent_on": "RLHF", "size": size, "part": part, "flops": flops} for part, flops in means.items()]
    return rows


SPENT_ON = {
    "pretraining": ("more documents", style.CATEGORIES[0], "s"),
    "pretraining, by rung": ("larger rungs", style.CATEGORIES[7], "o"),
    "RLHF": ("more RLHF", style.CATEGORIES[3], "D"),
}
"""Label, colour and marker of what compute is spent on."""
PARTS = ("labels", "reward model", "roll-outs", "reward", "evaluation", "updates")
"""What RLHF's compute goes into, in order of use."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame, flops: pd.DataFrame) -> Figure:
    """Draw accuracy against compute for pretraining and RLHF on one axis, and what RLHF's compute goes into.

    Args:
        runs: ``spent_on``, ``size``, ``seed``, ``metric``, ``value``; ``sampled_exact`` is drawn.
        summary: the common columns, ``spent_on``, ``size``, ``flops``, ``verdict``; quantities ``sampled_exact`` by
            size, ``slope_fit``, ``slope`` and ``slope_difference`` (one row, with the verdict).
        flops: ``spent_on``, ``size``, ``part``, ``flops``.
    """
    difference = style.select(summary, "slope_difference").iloc[0]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars and bands: ')} "
        "Legend: slopes for each doubling of compute. "
        f"That of pretraining on more documents minus that of RLHF: {style.signed_interval(difference)}. "
        f"{CLAIM.id}: {difference.verdict}."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 3.0, caption)
    total = flops.groupby(["spent_on", "size"])["flops"].sum()
    sampled = runs[(runs["metric"] == "sampled_exact") & runs["spent_on"].notna()]
    handles = []
    for name, (label, color, marker) in SPENT_ON.items():
        dots = sampled[sampled["spent_on"] == name]
        style.draw_dots(left, dots.assign(flops=dots["size"].map(total[name])), "flops", color)
        rows = style.select(summary, "sampled_exact", spent_on=name)
        style.draw_estimates(left, rows, "flops", color=color, marker=marker, linestyle="none")
        style.draw_band(left, style.select(summary, "slope_fit", spent_on=name), "flops", color)
        slope = style.select(summary, "slope", spent_on=name).iloc[0]
        handles.append(Line2D([], [], color=color, marker=marker, label=f"{label}: {slope.estimate:+.4f}"))
    left.set_xscale("log")
    left.set(title="accuracy by compute", xlabel="FLOPs", ylabel="sampled exact-match accuracy")
    rlhf = flops[flops["spent_on"] == "RLHF"].pivot_table(index="size", columns="part", values="flops")[list(PARTS)]
    below = rlhf.cumsum(axis=1).shift(axis=1, fill_value=0.0)
    for part, color in zip(PARTS, style.CATEGORIES[1:7], strict=True):
        right.bar(range(len(rlhf)), rlhf[part], bottom=below[part], color=color, width=0.7, label=part)
    right.set_xticks(range(len(rlhf)), [f"{size:.0f}" for size in rlhf.index])
    right.set(title="what RLHF's compute goes into", xlabel="PPO updates (labels grow alike)", ylabel="FLOPs")
    right.legend(loc="upper left")
    legend(handles, ncols=3)
    return figure
