"""Does process supervision win on its own task, and generalise worse to others? (claim C8)

Outcome and process reward models are trained on the same responses, to one task family or to both, and choose among
responses (best-of-N) on the family that they were trained on and on the other one.
"""

from itertools import product
from typing import ClassVar, Literal, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator
from safetensors.numpy import load_file

from rlhfscale.bed import ladder, specs
from rlhfscale.bed.recipe import FAMILIES
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import slope_per_doubling
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders, best_of_n_gain, read_responses
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, mean_intervals, new_rng

Kind = Literal["outcome", "process"]
KINDS: tuple[Kind, ...] = ("outcome", "process")
EVERY = "both"
"""Name of the training data of all families."""
TRAINED_ON = (*FAMILIES, EVERY)


class Params(OnePolicy):
    """C8: outcome and process reward models from the same responses, on the task they were trained on and on others."""

    figure: ClassVar[str] = "08_process_supervision"
    from_scratch: ClassVar[str] = "08_process_supervision needs labels of steps, and answers to its questions have none"
    title: ClassVar[str] = "Process supervision wins on its own task and generalises worse"
    claims: ClassVar[tuple[str, ...]] = ("C8",)

    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    labelled_prompts: int = field(
        role="fixed", ge=2, doc="labelled prompts of each reward model, of one family or both"
    )
    aggregate: Literal["last", "min", "product"] = field(
        role="fixed", doc="how the probabilities of a response's steps make its score"
    )
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")
    ppo_rung: str = field(role="fixed", doc="reward-model rung that policies are trained against")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.ppo_rung not in self.reward_model_rungs:
            raise ValueError(f"ppo_rung: {self.ppo_rung!r} is not among reward_model_rungs")
        if self.labelled_prompts % len(self.settings.label_rungs):
            raise ValueError(f"labelled_prompts: {self.labelled_prompts} do not share out to the label rungs")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def reward_model(self, kind: Kind, rung: str, trained_on: str, seed: int) -> specs.AnyRewardModel:
        families = FAMILIES if trained_on == EVERY else (trained_on,)
        outcome = self.settings.reward_model(rung, seed)
        share = self.labelled_prompts // len(outcome.data)
        data = tuple(part.changed(families=families, num_prompts=share) for part in outcome.data)
        outcome = outcome.changed(data=data, num_prompts=self.labelled_prompts)
        if kind == "outcome":
            return outcome
        shared = ("base", "data", "held_out", "num_prompts", "epochs", "lr", "muon_lr", "lora_rank", "seed")
        return specs.ProcessRewardModel(
            **{name: getattr(outcome, name) for name in shared},
            responses_per_batch=outcome.prompts_per_batch * self.settings.label_samples,
            aggregate=self.aggregate,
        )

    def cells(self) -> list[tuple[Kind, str, str]]:
        """Kind, rung and training data of each reward model."""
        return list(product(KINDS, self.reward_model_rungs, TRAINED_ON))

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, kind: Kind, rung: str, trained_on: str, seed: int) -> specs.Scores:
        return self.settings.scores(self.samples, self.reward_model(kind, rung, trained_on, seed))

    def policy(self, kind: Kind, seed: int) -> specs.Policy:
        """The policy trained against a reward model of `ppo_rung` that was trained on every family."""
        policy = self.settings.policy(self.policy_rung, self.ppo_rung, seed)
        return policy.changed(reward_model=self.reward_model(kind, self.ppo_rung, EVERY, seed))

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(KINDS, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        models, scored = [self.reward_model(*cell) for cell in cells], [self.scores(*cell) for cell in cells]
        return (*super().specs(), self.samples, *models, *scored)


CLAIM = register(
    Claim(
        id="C8",
        statement="Process supervision beats outcome supervision on its own task and generalises worse to others",
        paper="",
        statistic=(
            "gain in exact accuracy of best-of-N (N = 8 at the laptop tier) by a process reward model minus that "
            "by an outcome reward model trained on the same responses, mean over rungs: on prompts of the "
            "family that both were trained on, and on prompts of another family"
        ),
        rule=Rule((Part("own task", "above"), Part("other task", "below"))),
    )
)
ROLES = ("own", "other", EVERY)
"""Training data as a held-out prompt sees it: of its own family, of the other one, of both."""


def measure(P: Params, folders: Folders) -> Tables:
    """C8: best-of-N by kind of supervision and training data, step errors found, and PPO against either kind."""
    found = Collector(P, folders)
    drawn = read_responses(folders, P.samples)
    gains = {kind: _gains(P, kind, found, drawn.exact, drawn.family) for kind in KINDS}  # [role, rung, seed, prompt]
    sizes = np.array([ladder.rung(rung).num_params for rung in P.reward_model_rungs], float)
    for kind, values in gains.items():
        for role, by_rung in zip(ROLES, values, strict=True):
            about = {"kind": kind, "trained_on": role}
            for rung, interval in zip(P.reward_model_rungs, mean_intervals(by_rung).split(), strict=True):
                params = {"reward_model": rung, "reward_model_params": ladder.rung(rung).num_params}
                found.summary.append(summary_row("best_of_n_gain", interval, **params, **about))
            slope = nested_bootstrap(by_rung, lambda m: slope_per_doubling(sizes, m), rng=new_rng(), on="means")
            found.summary.append(summary_row("best_of_n_slope", slope, **about))
    difference = (gains["process"] - gains["outcome"]).mean(1)  # [role, seed, prompt]
    parts = dict(zip(ROLES, mean_intervals(difference).split(), strict=True))
    result = CLAIM.judge(dict(zip(CLAIM.rule.intervals, (parts["own"], parts["other"]), strict=True)))
    for role, part in parts.items():
        found.summary.append(summary_row("process_minus_outcome", part, trained_on=role) | {"verdict": result.verdict})
    own, other, every = (gains["process"].mean(1)[ROLES.index(role)] for role in ("own", "other", EVERY))
    for quantity, values in (("loss_of_transfer", own - other), ("diversity_effect", every - (own + other) / 2)):
        interval = nested_bootstrap(values, np.mean, rng=new_rng(), on="means")
        found.summary.append(summary_row(quantity, interval, kind="process"))
    _step_errors(P, found)
    _ppo(P, found)
    return found.tables(result)


def _gains(P: Params, kind: str, found: Collector, exact: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Best-of-N above one response, float64 [role, rung, seed, prompt]; adds rows by family and training data."""
    by_data = {}
    for rung in P.reward_model_rungs:
        for trained_on in TRAINED_ON:
            for seed in P.seeds:
                spec = P.scores(kind, rung, trained_on, seed)
                gain = best_of_n_gain(found.folders, spec, exact, P.best_of)
                by_data[rung, trained_on, seed] = gain
                about = {"kind": kind, "data": trained_on, "reward_model": rung}
                about |= {"reward_model_params": ladder.rung(rung).num_params}
                found.add(spec, seed, "best_of_n_gain", gain, **about)
    values = np.empty((len(ROLES), len(P.reward_model_rungs), len(P.seeds), len(exact)))
    at = family, np.arange(len(exact))
    for r, rung in enumerate(P.reward_model_rungs):
        for s, seed in enumerate(P.seeds):
            of = {name: by_data[rung, name, seed] for name in TRAINED_ON}
            values[0, r, s] = np.stack([of[name] for name in FAMILIES])[at]
            others = [[of[name] for name in FAMILIES if name != own] for own in FAMILIES]
            values[1, r, s] = np.mean(others, axis=1)[at]
            values[2, r, s] = of[EVERY]
    return values


def _step_errors(P: Params, found: Collector) -> None:
    """Rows of how well process reward models find the first wrong step of held-out responses."""
    for rung in P.reward_model_rungs:
        for trained_on in TRAINED_ON:
            by_seed = []
            for seed in P.seeds:
                spec = P.reward_model("process", rung, trained_on, seed)
                held_out = load_file(found.folders[spec] / "held_out.safetensors")
                by_family = [_f1(held_out, held_out["family"] == index) for index in range(len(FAMILIES))]
                for family, value in zip(FAMILIES, by_family, strict=True):
                    about = {"kind": "process", "data": trained_on, "family": family, "reward_model": rung}
                    count = int((held_out["family"] == FAMILIES.index(family)).sum())
                    metrics = {"first_error_f1": value}
                    found.rows.add(spec, metrics, rung=P.policy_rung, seed=seed, num_prompts=count, **about)
                by_seed.append(by_family)
            about = {"kind": "process", "data": trained_on, "reward_model": rung}
            about |= {"reward_model_params": ladder.rung(rung).num_params}
            for family, values in zip(FAMILIES, np.transpose(by_seed), strict=True):
                found.seeds_alone("first_error_f1", values, family=family, **about)


def _f1(held_out: dict[str, np.ndarray], chosen: np.ndarray) -> float:
    """Harmonic mean of two shares: of responses with a wrong step those whose first one was found, and of those without
    one those in which none was found (Zheng et al. 2024, ProcessBench, arXiv 2412.06559)."""
    wrong, hit = held_out["first_wrong"] >= 0, held_out["first_wrong_found"] == held_out["first_wrong"]
    found, clean = (hit[kind].mean() if kind.any() else 0.0 for kind in (chosen & wrong, chosen & ~wrong))
    return float(2 * found * clean / (found + clean)) if found and clean else 0.0


def _ppo(P: Params, found: Collector) -> None:
    """Rows of PPO against either kind of reward model, of `ppo_rung` and trained on every family."""
    before = found.before()
    gains = []
    for kind in KINDS:
        gains.append(found.after([P.policy(kind, seed) for seed in P.seeds], kind=kind, data=EVERY) - before)
    for kind, interval in zip(KINDS, mean_intervals(np.array(gains)).split(), strict=True):
        found.summary.append(summary_row("ppo_gain", interval, kind=kind))
    difference = nested_bootstrap(gains[1] - gains[0], np.mean, rng=new_rng(), on="means")
    found.summary.append(summary_row("ppo_process_minus_outcome", difference))


KIND_STYLES = {"outcome": (style.CATEGORIES[1], "o"), "process": (style.CATEGORIES[0], "s")}
TITLES = {"own": "own family", "other": "other family", "both": "both families"}
"""What the reward models were trained on, as a held-out prompt sees it."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C8: best-of-N by outcome and process reward models, by what they were trained on; step errors found.

    Args:
        runs: ``kind``, ``data``, ``family``, ``reward_model_params``, ``seed``, ``metric``, ``value``;
            ``first_error_f1`` is drawn as dots.
        summary: the common columns, ``kind``, ``trained_on``, ``data``, ``family``, ``reward_model_params``,
            ``verdict``; quantities ``best_of_n_gain`` (by kind, training data and size), ``process_minus_outcome`` (by
            training data) and ``first_error_f1`` (by size, training data and family).
    """
    whole = {row.trained_on: row for row in style.select(summary, "process_minus_outcome").itertuples()}
    caption = (
        f"{style.interval_caption(summary, 'bars: ')} Titles: training data. "
        f"Process minus outcome, mean over sizes: on its own task "
        f"{style.signed_interval(whole['own'])}, on the other {style.signed_interval(whole['other'])}, trained on both "
        f"{style.signed_interval(whole['both'])}. C8: {whole['own'].verdict}. F1: dots are seeds."
    )
    figure, axes, legend = style.new_figure(1, 4, 2.5, caption)
    gains = style.select(summary, "best_of_n_gain")
    for axis, (role, title) in zip(axes, TITLES.items(), strict=False):
        for kind, (color, marker) in KIND_STYLES.items():
            rows = gains[(gains["kind"] == kind) & (gains["trained_on"] == role)]
            style.draw_estimates(axis, rows, "reward_model_params", color=color, marker=marker)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=title)
        if axis is not axes[0]:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
        style.size_axis(axis, gains["reward_model_params"], "reward-model size")
    axes[0].set(ylabel="best-of-N gain in accuracy")
    found = style.select(summary, "first_error_f1")
    dots = runs[runs["metric"] == "first_error_f1"].merge(
        found[["reward_model", "reward_model_params"]].drop_duplicates(), on="reward_model", suffixes=("_", "")
    )
    for own, (label, linestyle) in {True: ("own", "-"), False: ("other", "--")}.items():
        for table, draw in ((dots, False), (found, True)):
            chosen = table[(table["data"] != "both") & ((table["data"] == table["family"]) == own)]
            for family, of in chosen.groupby("family"):
                color = style.CATEGORIES[2] if family == found["family"].iloc[0] else style.CATEGORIES[4]
                if draw:
                    look = {"color": color, "marker": "D", "linestyle": linestyle, "label": f"{family}, {label}"}
                    style.draw_estimates(axes[3], of, "reward_model_params", **look)
                else:
                    style.draw_dots(axes[3], of, "reward_model_params", color, size=4)
    axes[3].set(title="first error", ylabel="F1", ylim=(0, 1))
    style.size_axis(axes[3], found["reward_model_params"], "reward-model size")
    for axis in axes:
        axis.tick_params(axis="x", labelrotation=60)
    handles = [Line2D([], [], color=c, marker=m, label=f"{kind} supervision") for kind, (c, m) in KIND_STYLES.items()]
    lines, labels = axes[3].get_legend_handles_labels()
    handles += [Line2D([], [], color=line[0].get_color(), linestyle=line[0].get_linestyle(), label=f"F1: {name}")
                for line, name in zip(lines, labels, strict=True)]  # fmt: skip
    legend(handles, ncols=3)
    return figure
