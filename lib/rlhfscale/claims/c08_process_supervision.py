"""Does process supervision win on its own task, and generalise worse to others? (claim C8)

An outcome reward model learns from right and wrong final answers, a process reward model from right and wrong steps.
Both are trained on the same responses, to tasks of one family or of both. They then choose among new responses
(best-of-N), on the task family that they were trained on and on the other one.
"""

from functools import partial
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
from rlhfscale.stats.bootstrap import Interval, nested_bootstrap, summary_row
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
"""Name of the training data that hold tasks of all families."""
TRAINED_ON = (*FAMILIES, EVERY)


class Params(OnePolicy):
    """Outcome and process reward models that are trained on the same responses, on one task family or on both."""

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
        if self.labelled_prompts % self.settings.label_parts:
            raise ValueError(f"labelled_prompts: {self.labelled_prompts} do not share out to the labellers")
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

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, kind: Kind, rung: str, trained_on: str, seed: int) -> specs.Scores:
        return self.settings.scores(self.samples, self.reward_model(kind, rung, trained_on, seed))

    def policy(self, kind: Kind, seed: int) -> specs.Policy:
        """Return the policy trained against a reward model of `ppo_rung` that was trained on both families."""
        policy = self.settings.policy(self.policy_rung, self.ppo_rung, seed)
        return policy.changed(reward_model=self.reward_model(kind, self.ppo_rung, EVERY, seed))

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(KINDS, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = list(product(KINDS, self.reward_model_rungs, TRAINED_ON, self.seeds))
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
"""Training data as seen from a held-out prompt: tasks of the prompt's own family, of the other one, of both."""


def measure(P: Params, made: Folders) -> Tables:
    """Return gains of best-of-N and of PPO by kind of supervision, and how often wrong steps are found."""
    found = Collector(P, made)
    drawn = read_responses(made, P.samples)
    gains = {kind: _gains(P, kind, found, drawn.exact, drawn.family) for kind in KINDS}  # [role, rung, seed, prompt]
    sizes = [ladder.rung(rung).num_params for rung in P.reward_model_rungs]
    for kind, role in product(KINDS, ROLES):
        by_rung, about = gains[kind][ROLES.index(role)], {"kind": kind, "trained_on": role}
        for rung, interval in zip(P.reward_model_rungs, mean_intervals(by_rung).split(), strict=True):
            found.summary.append(summary_row("best_of_n_gain", interval, **_of_rung(rung), **about))
        slope = nested_bootstrap(by_rung, partial(slope_per_doubling, sizes), rng=new_rng(), on="means")
        found.summary.append(summary_row("best_of_n_slope", slope, **about))
    difference = (gains["process"] - gains["outcome"]).mean(1)  # [role, seed, prompt]
    parts = dict(zip(ROLES, mean_intervals(difference).split(), strict=True))
    result = CLAIM.judge({"own task": parts["own"], "other task": parts["other"]})
    for role, part in parts.items():
        found.summary.append(summary_row("process_minus_outcome", part, trained_on=role) | {"verdict": result.verdict})
    own, other, every = gains["process"].mean(1)
    for quantity, values in (("loss_of_transfer", own - other), ("diversity_effect", every - (own + other) / 2)):
        found.summary.append(summary_row(quantity, _mean(values), kind="process"))
    _step_errors(P, found)
    before = found.before()
    ppo = [found.after([P.policy(kind, seed) for seed in P.seeds], kind=kind, data=EVERY) - before for kind in KINDS]
    for kind, interval in zip(KINDS, mean_intervals(np.array(ppo)).split(), strict=True):
        found.summary.append(summary_row("ppo_gain", interval, kind=kind))
    found.summary.append(summary_row("ppo_process_minus_outcome", _mean(ppo[1] - ppo[0])))
    return found.tables(result)


def _of_rung(rung: str) -> dict[str, str | int]:
    return {"reward_model": rung, "reward_model_params": ladder.rung(rung).num_params}


def _mean(values: np.ndarray) -> Interval:
    """The interval of the mean of [seed, prompt]."""
    return nested_bootstrap(values, np.mean, rng=new_rng(), on="means")


def _gains(P: Params, kind: Kind, found: Collector, exact: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Best-of-N minus one response, float64 [role, rung, seed, prompt]; adds rows by family and training data."""
    gains = []
    for rung, trained_on, seed in product(P.reward_model_rungs, TRAINED_ON, P.seeds):
        spec = P.scores(kind, rung, trained_on, seed)
        gains.append(best_of_n_gain(found.folders, spec, exact, P.best_of))
        found.add(spec, seed, "best_of_n_gain", gains[-1], kind=kind, data=trained_on, **_of_rung(rung))
    by_data = np.reshape(gains, (len(P.reward_model_rungs), len(TRAINED_ON), len(P.seeds), len(exact)))
    of_one, of_all = by_data[:, :-1], by_data[:, -1]
    of_others = np.stack([np.delete(of_one, index, 1).mean(1) for index in range(len(FAMILIES))], 1)
    own, other = (np.take_along_axis(values, family[None, None, None], 1)[:, 0] for values in (of_one, of_others))
    return np.stack([own, other, of_all])


def _step_errors(P: Params, found: Collector) -> None:
    """Add rows of how well process reward models find the first wrong step of held-out responses."""
    for rung, trained_on in product(P.reward_model_rungs, TRAINED_ON):
        about, by_family = {"kind": "process", "data": trained_on}, {family: [] for family in FAMILIES}
        for seed in P.seeds:
            spec = P.reward_model("process", rung, trained_on, seed)
            held_out = load_file(found.folders[spec] / "held_out.safetensors")
            for index, (family, values) in enumerate(by_family.items()):
                chosen = held_out["family"] == index
                values.append(_f1(held_out, chosen))
                counted = {"seed": seed, "num_prompts": int(chosen.sum()), "family": family, "reward_model": rung}
                found.rows.add(spec, {"first_error_f1": values[-1]}, rung=P.policy_rung, **about, **counted)
        for family, values in by_family.items():
            found.seeds_alone("first_error_f1", values, family=family, **about, **_of_rung(rung))


def _f1(held_out: dict[str, np.ndarray], chosen: np.ndarray) -> float:
    """F1 of finding the first wrong step, the harmonic mean of two shares (Zheng et al. 2024, ProcessBench, arXiv
    2412.06559): of responses with a wrong step, those whose first one is found; of the others, those where none is."""
    wrong, hit = held_out["first_wrong"] >= 0, held_out["first_wrong_found"] == held_out["first_wrong"]
    found, clean = (hit[kind].mean() if kind.any() else 0.0 for kind in (chosen & wrong, chosen & ~wrong))
    return float(2 * found * clean / (found + clean)) if found and clean else 0.0


KIND_STYLES = {"outcome": (style.CATEGORIES[1], "o"), "process": (style.CATEGORIES[0], "s")}
TITLES = {"own": "own family", "other": "other family", "both": "both families"}
"""Title of each panel: the training data of the reward models, as seen from a held-out prompt."""


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw best-of-N by outcome and process reward models, by their training data, and the F1 of first wrong steps.

    Args:
        runs: ``kind``, ``data``, ``family``, ``reward_model``, ``seed``, ``metric``, ``value``; ``first_error_f1`` is
            drawn as dots.
        summary: the common columns, ``kind``, ``trained_on``, ``data``, ``family``, ``reward_model``,
            ``reward_model_params``, ``verdict``; quantities ``best_of_n_gain`` (by kind, training data and size),
            ``process_minus_outcome`` (by training data) and ``first_error_f1`` (by size, training data and family).
    """
    whole = {row.trained_on: row for row in style.select(summary, "process_minus_outcome").itertuples()}
    said = {role: style.signed_interval(row) for role, row in whole.items()}
    caption = (
        f"{style.interval_caption(summary, 'bars: ')} Titles: training data. "
        f"Process minus outcome, mean over sizes: on its own task {said['own']}, on the other {said['other']}, "
        f"trained on both {said['both']}. {CLAIM.id}: {whole['own'].verdict}. F1: dots are seeds."
    )
    figure, axes, legend = style.new_figure(1, 4, 2.5, caption)
    handles = [Line2D([], [], color=c, marker=m, label=f"{kind} supervision") for kind, (c, m) in KIND_STYLES.items()]
    for axis, (role, title) in zip(axes, TITLES.items(), strict=False):
        for kind, (color, marker) in KIND_STYLES.items():
            rows = style.select(summary, "best_of_n_gain", kind=kind, trained_on=role)
            style.draw_estimates(axis, rows, "reward_model_params", color=color, marker=marker)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=title)
        if axis is not axes[0]:
            axis.sharey(axes[0])
            axis.tick_params(labelleft=False)
    axes[0].set(ylabel="best-of-N gain in accuracy")
    found = style.select(summary, "first_error_f1")
    sizes = found.drop_duplicates("reward_model").set_index("reward_model")["reward_model_params"]
    dots = runs[runs["metric"] == "first_error_f1"]
    dots = dots.assign(reward_model_params=dots["reward_model"].map(sizes))
    of_one_family = [table[table["data"] != EVERY] for table in (dots, found)]
    colors = dict(zip(FAMILIES, (style.CATEGORIES[2], style.CATEGORIES[4]), strict=True))
    for (own, linestyle), (family, color) in product(((True, "-"), (False, "--")), colors.items()):
        seeds, estimates = (
            table[(table["family"] == family) & ((table["data"] == family) == own)] for table in of_one_family
        )
        style.draw_dots(axes[3], seeds, "reward_model_params", color, size=4)
        look = {"color": color, "linestyle": linestyle}
        style.draw_estimates(axes[3], estimates, "reward_model_params", marker="D", **look)
        handles.append(Line2D([], [], label=f"F1: {family}, {'own' if own else 'other'}", **look))
    axes[3].set(title="first error", ylabel="F1", ylim=(0, 1))
    for axis in axes:
        style.size_axis(axis, found["reward_model_params"], "reward-model size")
        axis.tick_params(axis="x", labelrotation=60)
    legend(handles, ncols=3)
    return figure
