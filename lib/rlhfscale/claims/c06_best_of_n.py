"""Do the gains of best-of-N diminish with N? (claim C6)

One policy answers each held-out prompt many times; reward models of several sizes choose one response among N. The
claim compares the gain for each doubling of N over small N with that over large N.
"""

from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from pydantic import model_validator

from rlhfscale.evals import best_of_n as bon
from rlhfscale.evals.best_of_n import kl_bound_nats
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import bootstrap, nested_bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, read_final_answers, read_responses, read_scores
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Runs, Tables, mean_intervals, new_rng, per_prompt_table


class Params(StudyFigure):
    """C6: best-of-N of one policy by reward models of several sizes."""

    figure: ClassVar[str] = "06_best_of_n"
    title: ClassVar[str] = "Best-of-N gains diminish with N"
    claims: ClassVar[tuple[str, ...]] = ("C6",)

    policy_rung: str = field(role="fixed", doc="SFT rung that is sampled")
    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=1, doc="rungs of the reward models")
    reference_rung: str = field(role="fixed", doc="reward-model rung that the verdict rests on")
    num_prompts: int = field(role="fixed", ge=2, doc="held-out prompts")
    num_samples: int = field(role="fixed", ge=1, doc="responses sampled to each prompt, M")
    best_of: tuple[int, ...] = field(role="scientific", min_length=1, doc="values of N, each at most num_samples")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.reference_rung not in self.reward_model_rungs:
            raise ValueError(f"reference_rung: {self.reference_rung!r} is not among reward_model_rungs")
        if len(set(self.best_of)) < len(self.best_of):
            raise ValueError(f"best_of: {list(self.best_of)} names a size twice")
        bad = [size for size in self.best_of if not 1 <= size <= self.num_samples]
        if bad:
            raise ValueError(f"best_of: {bad} must be from 1 to num_samples = {self.num_samples}")
        if max(self.best_of) < 64:
            raise ValueError("best_of: its largest size must be at least 64, so that early and late doublings differ")
        missing = [size for size in self.claim_sizes if size not in self.best_of]
        if missing:
            raise ValueError(f"best_of: lacks {missing}, which the statistic of C6 needs")
        return self

    @property
    def claim_sizes(self) -> tuple[int, int, int, int]:
        """First and last N of the early and of the late range: 1 to 8, and the last three doublings."""
        return 1, 8, max(self.best_of) // 8, max(self.best_of)

    @property
    def samples(self) -> roles.Samples:
        return self.settings.many_samples(self.policy_rung, self.num_prompts, self.num_samples)

    def scores(self, rung: str, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.settings.reward_model(rung, seed))

    def specs(self) -> tuple[Spec, ...]:
        scores = [self.scores(rung, seed) for rung in self.reward_model_rungs for seed in self.seeds]
        return self.samples, self.samples.model, *scores  # a language model's votes are read with its tokenizer


CLAIM = register(
    Claim(
        id="C6",
        statement="Best-of-N gains at inference diminish with N",
        paper="",
        statistic=(
            "mean gain in exact accuracy per doubling of N over N = 1..8 minus that over the last three doublings "
            "(64..512 at the laptop tier), best-of-N "
            "with the study's reference reward model"
        ),
        rule=Rule((Part("early minus late gain", "above"),)),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
    """C6: best-of-N by reward-model rung and seed, votes, pass@N, and how the gain for each doubling changes."""
    sizes, responses = list(P.best_of), read_responses(folders, P.samples)
    rows, prompts = Runs(P), []
    proxy = np.array(
        [[read_scores(folders, P.scores(rung, seed)) for seed in P.seeds] for rung in P.reward_model_rungs]
    )  # [reward model, seed, prompt, sample]
    curves = {
        "best_of_n": bon.best_of_n(np.broadcast_to(responses.exact, proxy.shape), proxy, sizes),
        "best_of_n_gold": _standardised_gold(responses.gold, proxy, sizes),
        "best_of_n_proxy": _standardised_proxy(proxy, sizes),
    }  # each [reward model, seed, prompt, size]
    for r, rung in enumerate(P.reward_model_rungs):
        for s, seed in enumerate(P.seeds):
            spec = P.scores(rung, seed)
            for n, size in enumerate(sizes):
                metrics = {name: curve[r, s, :, n].mean() for name, curve in curves.items()}
                about = {"seed": seed, "num_prompts": responses.num_prompts, "num_responses": size}
                rows.add(spec, metrics, rung=P.policy_rung, reward_model=rung, **about)
                if size in P.claim_sizes:
                    value = curves["best_of_n"][r, s, :, n]
                    per_prompt = per_prompt_table(spec, seed, "best_of_n", value)
                    prompts.append(per_prompt.assign(num_responses=size, reward_model=rung))
    summary = []
    for name, curve in curves.items():
        means = mean_intervals(np.moveaxis(curve, -1, 1).reshape(-1, *curve.shape[1:3]))
        cells = [(rung, size) for rung in P.reward_model_rungs for size in sizes]
        for (rung, size), interval in zip(cells, means.split(), strict=True):
            params = num_params(rung)
            about = {"reward_model": rung, "reward_model_params": params, "num_responses": size}
            summary.append(summary_row(name, interval, **about))
    for name, values in _votes(responses, read_final_answers(folders, P.samples), sizes).items():
        interval = bootstrap(values.T, lambda means: means, unit="prompt", rng=new_rng(), on="means")
        for size, part in zip(sizes, interval.split(), strict=True):
            summary.append(summary_row(name, part, num_responses=size))
    reference = np.moveaxis(curves["best_of_n"][P.reward_model_rungs.index(P.reference_rung)], -1, 0)
    difference = nested_bootstrap(reference, lambda m: _early_minus_late(P, m), rng=new_rng(), on="means")
    result = CLAIM.judge(difference)
    ranges = dict(zip(("first", "early", "late", "last"), P.claim_sizes, strict=True))
    row = summary_row("early_minus_late_gain", difference, reward_model=P.reference_rung, **ranges)
    summary.append(row | {"verdict": result.verdict})
    most = sizes.index(max(sizes))
    in_all = nested_bootstrap(reference, lambda m: m[most] - m[sizes.index(1)], rng=new_rng(), on="means")
    summary.append(summary_row("gain_at_largest_n", in_all, reward_model=P.reference_rung, num_responses=max(sizes)))
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), (result,))


def _early_minus_late(P: Params, means: np.ndarray) -> float:
    """Mean gain for each doubling of N over the early range of the claim minus that over its late range."""
    first, early, late, last = (means[P.best_of.index(size)] for size in P.claim_sizes)
    sizes = P.claim_sizes
    return (early - first) / np.log2(sizes[1] / sizes[0]) - (last - late) / np.log2(sizes[3] / sizes[2])


def _standardised_gold(gold: np.ndarray, proxy: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Gold of the chosen response above that of one response to the same prompt, in s.d. of single responses."""
    curve = bon.best_of_n(np.broadcast_to(gold / gold.std(), proxy.shape), proxy, sizes)
    return curve - curve[..., [sizes.index(1)]]


def _standardised_proxy(proxy: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Proxy of the chosen response above that of one response, in s.d. of each reward model's single scores."""
    curve = bon.expected_proxy(proxy / proxy.std(axis=(2, 3), keepdims=True), sizes)
    return curve - curve[..., [sizes.index(1)]]


def _votes(responses: Any, answers: np.ndarray, sizes: list[int]) -> dict[str, np.ndarray]:
    """pass@N and majority vote, float64 [prompt, size]. Unfinished responses have no answer: each is its own."""
    missing = answers < 0
    answers = np.where(missing, -1 - np.arange(answers.shape[1]), answers)
    vote = bon.majority_vote(answers, responses.exact, sizes, rng=new_rng())
    return {"pass_at_n": bon.pass_at_n(responses.exact, sizes), "majority_vote": vote}


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C6: best-of-N accuracy against N, and gold and proxy against the bound on KL.

    Args:
        runs: ``reward_model`` (rung name), ``num_responses``, ``seed``, ``metric``, ``value``; the metric
            ``best_of_n`` (exact accuracy) is drawn as dots.
        summary: the common columns and ``reward_model`` (rung name, empty where none is used),
            ``reward_model_params``, ``num_responses``, ``verdict``. Quantities in exact accuracy by ``num_responses``:
            ``best_of_n`` (by reward model), ``majority_vote``, ``pass_at_n`` and optionally ``weighted_vote``; in
            standard deviations of single responses of the initial policy, minus its mean, by reward model and
            ``num_responses``: ``best_of_n_gold`` and ``best_of_n_proxy``; ``early_minus_late_gain`` (one row) holds
            the claim's statistic, its sizes ``first``, ``early``, ``late`` and ``last``, and the verdict.
    """
    bon = style.select(summary, "best_of_n")
    sizes = dict(zip(bon["reward_model"], bon["reward_model_params"], strict=True))
    colors = style.size_colors(sizes)
    caption = style.interval_caption(summary, "dots: seeds; bars: ")
    claim = style.select(summary, "early_minus_late_gain").iloc[0]
    early, late = (f"{claim[a]:.0f}-{claim[b]:.0f}" for a, b in (("first", "early"), ("late", "last")))
    caption += (
        f" Gain per doubling, N = {early} minus N = {late}: {claim.estimate:+.3f} "
        f"[{claim.ci_low:+.3f}, {claim.ci_high:+.3f}], {claim.verdict}."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 3.9, caption)
    handles = _draw_votes(left, summary)
    dots = runs[runs["metric"] == "best_of_n"]
    for name, color in colors.items():
        style.draw_dots(left, dots[dots["reward_model"] == name], "num_responses", color, size=4)
        rows = bon[bon["reward_model"] == name]
        style.draw_estimates(left, rows, "num_responses", color=color, marker="o", markersize=2.5)
        for quantity, linestyle in (("best_of_n_gold", "-"), ("best_of_n_proxy", "--")):
            curve = style.select(summary, quantity, reward_model=name).sort_values("num_responses")
            kl_nats = kl_bound_nats(curve["num_responses"])
            alpha = 1.0 if linestyle == "-" else 0.55
            right.plot(kl_nats, curve["estimate"], color=color, linestyle=linestyle, alpha=alpha)
            if linestyle == "-":
                right.fill_between(kl_nats, curve["ci_low"], curve["ci_high"], color=color, alpha=0.15, linewidth=0)
    _axes(left, right, int(bon["num_responses"].max()))
    labels = [Line2D([], [], color=c, label=f"RM {style.human_number(sizes[name])}") for name, c in colors.items()]
    types = [
        Line2D([], [], color="0.3", label="gold (right)"),
        Line2D([], [], color="0.3", linestyle="--", alpha=0.55, label="proxy (right)"),
    ]
    legend([*labels, *handles, *types], ncols=4)
    return figure


def _draw_votes(axis: Axes, summary: pd.DataFrame) -> list[Line2D]:
    """Draw what needs no reward model, and pass@N as ceiling and floor; returns the legend's handles."""
    votes = {
        "pass_at_n": ("pass@N (ceiling)", "0.15", "-"),
        "majority_vote": ("majority vote", style.CATEGORIES[3], "--"),
        "weighted_vote": ("vote weighted by proxy", style.CATEGORIES[1], "--"),
    }
    handles = []
    for quantity, (label, color, linestyle) in votes.items():
        rows = style.select(summary, quantity, optional=quantity == "weighted_vote")
        if len(rows):
            style.draw_estimates(axis, rows, "num_responses", color=color, linestyle=linestyle, marker="")
            handles.append(Line2D([], [], color=color, linestyle=linestyle, label=label))
    ceiling = style.select(summary, "pass_at_n").sort_values("num_responses")
    axis.axhline(ceiling["estimate"].iloc[0], color="0.5", linestyle=":", linewidth=1.2)
    return [*handles, Line2D([], [], color="0.5", linestyle=":", label="pass@1 (floor)")]


def _axes(left: Axes, right: Axes, largest: int) -> None:
    """Scales, ticks and labels: N on a log axis, and the bound on the KL divergence on a square-root axis."""
    left.set_xscale("log", base=2)
    left.set_xticks(ticks := [n for n in (1, 4, 16, 64, 256, 1024) if n <= largest], [str(n) for n in ticks])
    left.xaxis.set_minor_locator(NullLocator())
    left.set(title="accuracy", xlabel="N, responses per prompt", ylabel="exact-match accuracy")
    right.axhline(0, color="0.4", linewidth=0.8)
    right.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    limit = float(kl_bound_nats([largest])[0])
    right.set_xlim(0, limit * 1.03)
    right.set_xticks(ticks := [kl for kl in (0, 0.25, 1, 2, 3, 4, 5, 6) if kl <= limit], [f"{kl:g}" for kl in ticks])
    right.set(title="over-optimisation", xlabel="KL upper bound (nats, sqrt axis)", ylabel="score above N = 1 (s.d.)")
