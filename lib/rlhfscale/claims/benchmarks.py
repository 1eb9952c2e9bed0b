"""Chat benchmarks: do their win rates recover the truth, and do their intervals hold it?

Simulated judgments, whose true win rate is known, go through the length-controlled win rate of AlpacaEval. Simulations
also count how often its intervals hold the truth. Where MT-Bench's questions, two policies and a judge are installed,
MT-Bench compares the policies.
"""

import json
import os
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.evals import alpaca_eval, planted, revisions, sources
from rlhfscale.evals import specs as evals_specs
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import Interval, bootstrap, summary_row
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders
from rlhfscale.study.figure import RecipeFigure
from rlhfscale.study.params import field
from rlhfscale.study.results import ResultsFolder
from rlhfscale.study.tables import Tables, command, new_rng, tier


class Params(RecipeFigure):
    """The length-controlled win rate on simulated judgments, and MT-Bench of two policies.

    MT-Bench needs its questions, the policies and the judge. Where one of them is not installed, the figure is made
    without MT-Bench, and `missing` says what to install.
    """

    figure: ClassVar[str] = "30_benchmarks"
    title: ClassVar[str] = "Chat benchmarks: win rates, lengths, and intervals that hold"
    judge_tokens: ClassVar[int] = 2048
    """Longest judgment of MT-Bench in tokens, as in FastChat."""
    max_missing: ClassVar[float] = 0.05
    """Share of missing verdicts above which MT-Bench fails."""
    dtype: ClassVar[str] = "bf16"
    """Number format of models that run in this process."""

    seed: int = field(role="scientific", ge=1, doc="of the planted judgments and of the policies' samples")
    win_rates: tuple[float, ...] = field(role="scientific", min_length=1, doc="planted, percent at equal length")
    extra_chars: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="by which each model's answers are longer"
    )
    num_instructions: int = field(role="fixed", ge=20, doc="planted judgments of each model")
    num_simulations: int = field(role="fixed", ge=2, doc="simulated evaluations for the coverage of intervals")
    num_refits: int = field(role="fixed", ge=10, doc="bootstrap refits of each length-controlled interval")
    before: str = field(role="scientific", doc="policy before RLHF: smollm2, or a model or adapter folder")
    after: str = field(role="scientific", doc="policy after RLHF")
    before_temperature: float = field(role="scientific", ge=0, doc="of its answers; 0 is greedy")
    after_temperature: float = field(role="scientific", ge=0, doc="of its answers")
    judge: str = field(role="scientific", doc="endpoint:MODEL, hf:FOLDER, vllm:FOLDER or reward:FOLDER")
    constrained: bool = field(role="fixed", doc="read verdicts off probabilities, for judges too weak for the format")
    num_questions: int = field(role="fixed", ge=2, le=80, doc="MT-Bench questions, of all categories in turn")
    max_new_tokens: int = field(role="fixed", ge=1, doc="of each answer")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.win_rates) != len(self.extra_chars):
            raise ValueError("extra_chars: needs one value for each of win_rates")
        if not all(0 < rate < 100 for rate in self.win_rates):
            raise ValueError(f"win_rates: {list(self.win_rates)} must be between 0 and 100, both excluded")
        kind, _, source = self.judge.partition(":")
        if kind not in ("endpoint", "hf", "vllm", "reward") or not source:
            raise ValueError(f"judge: {self.judge!r} is none of endpoint:MODEL, hf:FOLDER, vllm:FOLDER, reward:FOLDER")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,)

    @property
    def missing(self) -> tuple[str, ...]:
        """What MT-Bench needs and is not installed here, with the command that installs it."""
        found = []
        try:
            sources.mt_bench_revision()
        except FileNotFoundError as error:
            found.append(str(error))
        kind, _, source = self.judge.partition(":")
        local = {self.before, self.after} | (set() if kind == "endpoint" else {source})
        for name in sorted(name for name in local if not revisions.installed(name)):
            hint = "make setup EXTRAS=smollm2" if name == revisions.SMOLLM2 else "no such model folder"
            found.append(f"{name}: {hint}")
        if kind == "endpoint" and not os.environ.get("OPENAI_BASE_URL"):
            found.append(f"{self.judge}: set OPENAI_BASE_URL to its address")
        return tuple(found)

    @property
    def hardest(self) -> int:
        """Index of the simulated model whose answers differ most in length from the baseline's."""
        return int(np.argmax(np.abs(self.extra_chars)))

    @property
    def coverage(self) -> evals_specs.Coverage:
        """The simulations that count how often the intervals of the hardest model hold the truth."""
        return evals_specs.Coverage(
            win_rate=self.win_rates[self.hardest],
            extra_chars=self.extra_chars[self.hardest],
            num_instructions=self.num_instructions,
            num_simulations=self.num_simulations,
            num_refits=self.num_refits,
            seed=self.seed,
        )

    @property
    def mt_bench(self) -> evals_specs.MTBench:
        """The run of MT-Bench. Raises FileNotFoundError where something is not installed."""
        kind, _, source = self.judge.partition(":")
        names = ("before_temperature", "after_temperature", "judge", "constrained", "num_questions", "max_new_tokens")
        names += ("judge_tokens", "max_missing", "dtype", "seed")
        return evals_specs.MTBench(
            before=self.before,
            before_revision=revisions.revision(self.before),
            after=self.after,
            after_revision=revisions.revision(self.after),
            judge_revision="" if kind == "endpoint" else revisions.revision(source),
            questions_revision=sources.mt_bench_revision(),
            **{name: getattr(self, name) for name in names},
        )

    def specs(self) -> tuple[Spec, ...]:
        return (self.coverage,) if self.missing else (self.coverage, self.mt_bench)


def measure(P: Params, made: Folders) -> Tables:
    """Return the win rates of the simulated models, how often their intervals hold the truth, and MT-Bench.

    The further table mt_bench.csv holds MT-Bench's estimates. Where MT-Bench cannot be run here, an earlier table of
    the same parameters is kept if the results folder has one; `mt_bench_note` says which.
    """
    runs, summary, prompts = [], [], []
    for place, win_rate in enumerate(P.win_rates):
        shown = {"model": f"planted {place + 1}", "planted": win_rate}
        wins, intervals = _planted(P, place)
        summary += [summary_row(name, interval, **shown) for name, interval in intervals.items()]
        runs += [shown | {"metric": name, "value": interval.estimate} for name, interval in intervals.items()]
        prompts.append(pd.DataFrame({"metric": "win", "value": wins, "model": shown["model"]}))
    about = {"node": f"planted-{P.hash}", "seed": P.seed}
    common = about | {"figure": P.figure, "command": command(P), "rung": "", "num_params": 0}
    counted = {"num_seeds": P.num_simulations, "num_prompts": P.num_instructions}
    for name, share in json.loads((made[P.coverage] / "coverage.json").read_text()).items():
        low, high = proportion_interval(share, P.num_simulations)
        row = {"quantity": "coverage", "model": f"planted {P.hardest + 1}", "interval": name, "estimate": share}
        summary.append(row | {"ci_low": low, "ci_high": high, "ci_method": "simulations, Wilson"} | counted)
    mt_bench = _kept_mt_bench(P) if P.missing else _mt_bench(P, made)
    return Tables(
        pd.DataFrame(runs).assign(num_prompts=P.num_instructions, **common),
        pd.DataFrame(summary),
        pd.concat([table.rename_axis("prompt_id").reset_index().assign(**about) for table in prompts]),
        extra={} if mt_bench is None else {"mt_bench.csv": mt_bench},
    )


def _planted(P: Params, place: int) -> tuple[np.ndarray, dict[str, Interval]]:
    """Wins float64 [instruction] of one simulated model, and the intervals of its win rates and of its extra length."""
    rng, counted = np.random.default_rng((P.seed, place)), {"num_instructions": P.num_instructions}
    drawn = planted.annotations(rng, win_rate=P.win_rates[place], extra_chars=P.extra_chars[place], **counted)
    gamed = planted.gamed(rng, **counted)
    extra_chars = drawn.len_model - drawn.len_baseline
    options = {"C": planted.C, "rng": new_rng(), "num_draws": P.num_refits}
    return drawn.wins, {
        "win_rate": alpaca_eval.win_rate_interval(drawn, rng=new_rng()),
        "length_controlled": alpaca_eval.lc_interval(drawn, gamed, **options),
        "extra_chars": bootstrap(extra_chars, np.mean, unit="prompt", rng=new_rng(), on="means"),
    }


def proportion_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's (1927) 95% interval of a share of ``count`` independent trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return float(middle - half), float(middle + half)


def _mt_bench(P: Params, made: Folders) -> pd.DataFrame:
    from rlhfscale.evals import mt_judged  # it imports torch

    folder = made[P.mt_bench]
    about = {"judge": P.judge, "constrained": P.constrained}
    pairs = pd.read_csv(folder / "pairs.csv").replace({"winner": {np.nan: None}})
    tables = [mt_judged.mt_pair_summary(pairs, new_rng(), stage="after against before", **about)]
    if (folder / "scores.csv").is_file():
        for stage, rows in pd.read_csv(folder / "scores.csv").groupby("stage"):
            tables.append(mt_judged.mt_summary(rows, new_rng(), stage=stage, **about))
    return pd.concat(tables, ignore_index=True).assign(params_hash=P.hash)


def _kept_mt_bench(P: Params) -> pd.DataFrame | None:
    """MT-Bench's estimates of an earlier run with the same parameters, from the results folder."""
    path = ResultsFolder(P.figure, tier=tier(P)).path / "mt_bench.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    return table if (table["params_hash"] == P.hash).all() else None


def mt_bench_note(P: Params, tables: Tables) -> str:
    """Return a sentence that says whether MT-Bench was run here, and what is missing if not."""
    if not P.missing:
        return f"MT-Bench: {P.num_questions} questions, {P.after} against {P.before}, judged by {P.judge}."
    found = "the table below is an earlier run's" if "mt_bench.csv" in tables.extra else "no table of it is shown"
    return f"MT-Bench was not run here ({'; '.join(P.missing)}); {found}."


KIND_STYLES = {
    "win_rate": ("raw", style.CATEGORIES[7], "o", 0.14),
    "length_controlled": ("at equal length", style.CATEGORIES[0], "s", -0.14),
}
"""Label, colour, marker and vertical shift of the two win rates."""


@style.styled
def draw(summary: pd.DataFrame, mt_bench: pd.DataFrame | None = None) -> Figure:
    """Draw win rates with intervals beside the difference in length, a row for each model.

    Args:
        summary: the common columns and ``model``, ``planted`` (the true win rate at equal length, percent),
            ``interval``; quantities ``win_rate`` and ``length_controlled`` in percent, ``extra_chars``, and
            ``coverage`` of the two kinds of ``interval`` for the caption.
        mt_bench: estimates of MT-Bench, whose pairs are drawn as a further row; None leaves it out.
    """
    raw, extra_chars = style.select(summary, "win_rate"), style.select(summary, "extra_chars")
    place = {name: float(len(raw) - index) for index, name in enumerate(raw["model"])}
    first = raw.iloc[0]
    caption = f"Planted models: 95% intervals ({first.ci_method}), {first.num_prompts} instructions each."
    for name, label in {"refit": "intervals that refit", "published": "the published standard error"}.items():
        row = style.select(summary, "coverage", interval=name).iloc[0]
        caption += f" Coverage of {label}: {row.estimate:.2f} [{row.ci_low:.2f}, {row.ci_high:.2f}]."
    if mt_bench is not None:
        place["MT-Bench"] = 0.0
        pairs, chars = (style.select(mt_bench, f"mt_bench/{name}") for name in ("win_rate_adjusted", "extra_chars"))
        caption += f" MT-Bench: {pairs['num_prompts'].iloc[0]} questions, judge {pairs['judge'].iloc[0]}."
    figure, (left, right), legend = style.new_figure(1, 2, 1.3 + 0.42 * len(place), caption)
    handles = []
    for quantity, (label, color, marker, shift) in KIND_STYLES.items():
        table = style.select(summary, quantity)
        style.draw_across(left, table, table["model"].map(place) + shift, color, marker)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="none", label=label))
    truth = {"marker": "|", "color": "k"}
    left.scatter(raw["planted"], raw["model"].map(place) - 0.14, s=120, linewidths=1.4, zorder=4, **truth)
    handles.append(Line2D([], [], markersize=9, linestyle="none", label="planted truth", **truth))
    style.draw_across(right, extra_chars, extra_chars["model"].map(place), style.CATEGORIES[2], "D")
    if mt_bench is not None:
        percent = pairs[["estimate", "ci_low", "ci_high"]].astype(float) * 100
        style.draw_across(left, percent, pd.Series([0.0]), style.CATEGORIES[3], "D")
        style.draw_across(right, chars, pd.Series([0.0]), style.CATEGORIES[2], "D")
        handles.append(Line2D([], [], color=style.CATEGORIES[3], marker="D", linestyle="none", label="MT-Bench pairs"))
    left.axvline(50, color="0.4", linewidth=0.8)
    right.axvline(0, color="0.4", linewidth=0.8)
    for axis, labels in ((left, list(place)), (right, [""] * len(place))):
        axis.set_yticks(list(place.values()), labels)
        axis.set_ylim(min(place.values()) - 0.5, len(raw) + 0.5)
    left.set(title="win rate", xlabel="percent", xlim=(0, 100))
    right.set(title="length", xlabel="characters more than the other side")
    legend(handles, ncols=4)
    return figure
