"""The registry of claims: what is measured, and the rule that turns its interval into a verdict.

A rule is data, fixed here before the runs. :func:`judge` applies it; :func:`write_ledger` gathers the verdicts of one
tier into claims.csv and claims.md.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import stats

from rlhfscale.models.files import replace_file
from rlhfscale.stats.bootstrap import Interval

Verdict = Literal["reproduced", "contradicted", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "contradicted", "inconclusive")
POWER = 0.8
"""Chance of a conclusive interval at which :func:`seeds_to_settle` aims."""
MAX_SEEDS = 10_000
EQUIVALENCE_MARGIN = 0.01
"""Difference in exact accuracy within which two algorithms count as equal: about a quarter of what PPO gains at the
rung of the comparison (0.044 at 55k, claim C1)."""


MIX_MARGIN = 0.01
"""Difference in exact accuracy below which two kinds of label count as equal; that of `EQUIVALENCE_MARGIN`."""
MIX_CONTRASTS = (
    "preference minus rejection sampling",
    "preference minus process",
    "rejection sampling minus process",
)
MIX_CONFIDENCE = 1 - 0.05 / len(MIX_CONTRASTS)
"""Bonferroni: the three hold together at 95%."""


@dataclass(frozen=True)
class Part:
    """One interval's test: reproduced if all of it lies on the claim's side, contradicted if all on the other."""

    interval: str
    """Name of the interval that is tested."""
    side: Literal["below", "above"]
    """Side of the threshold on which the claim places the statistic."""
    threshold: float = 0.0
    premise: bool = False
    """Without it the claim says nothing, such as that there is an effect at all: then the verdict is inconclusive."""

    def verdict(self, interval: Interval) -> Verdict:
        """Verdict of this part alone; an interval that touches the threshold is inconclusive."""
        below, above = interval.high < self.threshold, interval.low > self.threshold
        on_side, opposite = (below, above) if self.side == "below" else (above, below)
        return "reproduced" if on_side else "contradicted" if opposite else "inconclusive"

    def describe(self) -> str:
        """The test in words, for the ledger."""
        sign = {"below": "<", "above": ">"}[self.side]
        return f"{self.interval} {sign} {self.threshold:g}{' (premise)' if self.premise else ''}"


@dataclass(frozen=True)
class Rule:
    """Parts, and how their verdicts combine. Two parts on one interval, below and above, test for equivalence.

    ``all``: reproduced if every part is, contradicted if any part is. ``any``: reproduced if any part is, contradicted
    if every part is. Else inconclusive, as where a premise does not hold.
    """

    parts: tuple[Part, ...]
    combine: Literal["all", "any"] = "all"

    @property
    def intervals(self) -> tuple[str, ...]:
        """Names of the intervals that the parts test, each once."""
        return tuple(dict.fromkeys(part.interval for part in self.parts))

    def verdict(self, intervals: Mapping[str, Interval]) -> Verdict:
        """Verdict for named intervals; ValueError unless their names are those of the parts."""
        if set(intervals) != set(self.intervals):
            raise ValueError(f"the rule needs the intervals {sorted(self.intervals)}, got {sorted(intervals)}")
        if any(part.verdict(intervals[part.interval]) != "reproduced" for part in self.parts if part.premise):
            return "inconclusive"
        verdicts = [part.verdict(intervals[part.interval]) for part in self.parts if not part.premise]
        unanimous, single = ("reproduced", "contradicted") if self.combine == "all" else ("contradicted", "reproduced")
        if single in verdicts:
            return single
        return unanimous if set(verdicts) == {unanimous} else "inconclusive"

    def describe(self) -> str:
        """The rule in words, for the ledger."""
        return f" {'and' if self.combine == 'all' else 'or'} ".join(part.describe() for part in self.parts)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is tested."""

    id: str
    """C1 ... C10 in the paper's abstract and text; Q and N for questions beyond it."""
    statement: str
    """The claim in one line."""
    paper: str
    """The figure that the paper reports for it; empty where none is known."""
    statistic: str
    """What is estimated, with its unit."""
    rule: Rule
    """The verdict rule on the intervals of the statistic."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim's intervals and verdict."""

    claim_id: str
    verdict: Verdict
    intervals: dict[str, Interval]
    """By the names of the rule's parts."""

    def to_json(self) -> dict:
        """An entry of claims.json: flat keys with the first interval, and all intervals for :meth:`from_json`."""
        first = self.intervals[CLAIMS[self.claim_id].rule.intervals[0]]
        return {
            "claim": self.claim_id,
            "statement": CLAIMS[self.claim_id].statement,
            "verdict": self.verdict,
            "estimate": first.estimate,
            "ci_low": first.low,
            "ci_high": first.high,
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping) -> "ClaimResult":
        """The result that :meth:`to_json` described."""
        intervals = {name: Interval(**fields) for name, fields in data["intervals"].items()}
        return cls(data["claim"], data["verdict"], intervals)


CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim(
            id="C1",
            statement="With a fixed reward model, larger policies gain less from RLHF",
            paper="average gain falls from 4.4% to 1.9% as the policy grows from 9B to 200B",
            statistic=(
                "slope of the gain in sampled exact-match accuracy from PPO (policy minus SFT) per doubling of "
                "non-embedding policy parameters, reward model fixed"
            ),
            rule=Rule((Part("slope", "below"),)),
        ),
        Claim(
            id="C2",
            statement="Larger reward models help policy training, but less than they help best-of-N",
            paper="",
            statistic=(
                "slope of the gain in sampled exact accuracy per doubling of non-embedding reward-model parameters, "
                "policy fixed: of PPO, and of best-of-N minus that of PPO (N = 8 at the laptop tier; equal prompts)"
            ),
            rule=Rule((Part("PPO slope", "above"), Part("best-of-N slope minus PPO slope", "above"))),
        ),
        Claim(
            id="C3",
            statement="More training data help policies fast at first, then they plateau",
            paper="",
            statistic=(
                "gain in sampled exact accuracy from PPO on training prompts that are seen once each: what the first "
                "quarter of the data brings, and what the other three quarters bring minus half of that (a plateau: "
                "three times the data again bring less than half)"
            ),
            rule=Rule((Part("first quarter", "above"), Part("rest minus half of the first quarter", "below"))),
        ),
        Claim(
            id="C4",
            statement="For reward-model data, more prompts beat more responses per prompt at equal labels",
            paper="",
            statistic=(
                "accuracy within held-out prompts that a reward model gains from a doubling of its prompts minus what "
                "it gains from a doubling of the responses to each, by a plane fitted over the logs of both; along a "
                "diagonal of equal labels this is the gain of trading one doubling for the other"
            ),
            rule=Rule((Part("prompts minus responses", "above"),)),
        ),
        Claim(
            id="C5",
            statement="More responses per prompt in policy training help at first and plateau quickly",
            paper="",
            statistic=(
                "gain in sampled exact accuracy per doubling of PPO's responses per prompt, at equal prompts and "
                "optimiser steps: mean of the first two doublings, and the last doubling minus half of that mean (a "
                "plateau: the last doubling brings less than half of what the first ones brought)"
            ),
            rule=Rule((Part("first doublings", "above"), Part("last doubling minus half of the first", "below"))),
        ),
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
        ),
        Claim(
            id="C7",
            statement="The data mix matters: preference, rejection-sampling and process data saturate differently",
            paper="",
            statistic=(
                "gain in exact accuracy of best-of-N (N = 8 at the laptop tier) by reward models from one kind of "
                "label alone, at the larger budget: the difference between two kinds; margin "
                f"{MIX_MARGIN}; intervals at 98.3%, so that the three differences hold together at 95%; premise: the "
                "mean gain over the kinds exceeds the margin"
            ),
            rule=Rule(
                (
                    *(Part(contrast, "above", MIX_MARGIN) for contrast in MIX_CONTRASTS),
                    *(Part(contrast, "below", -MIX_MARGIN) for contrast in MIX_CONTRASTS),
                    Part("mean gain", "above", MIX_MARGIN, premise=True),
                ),
                combine="any",
            ),
        ),
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
        ),
        Claim(
            id="C9",
            statement="The RL algorithm (PPO or GRPO) matters little",
            paper="",
            statistic=(
                "sampled exact accuracy after GRPO minus that after PPO, at equal roll-outs, mean over the numbers of "
                f"responses per prompt; equivalence: two one-sided tests, margin {EQUIVALENCE_MARGIN}; premise: PPO's "
                "own gain exceeds the margin"
            ),
            rule=Rule(
                (
                    Part("GRPO minus PPO", "below", EQUIVALENCE_MARGIN),
                    Part("GRPO minus PPO", "above", -EQUIVALENCE_MARGIN),
                    Part("PPO gain", "above", EQUIVALENCE_MARGIN, premise=True),
                )
            ),
        ),
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
        ),
    )
}


def judge(claim_id: str, interval: Interval | Mapping[str, Interval]) -> ClaimResult:
    """Apply a registered claim's rule.

    Args:
        claim_id: a key of :data:`CLAIMS`.
        interval: the interval of the claim's statistic; for a rule of several parts, intervals by name.

    Raises:
        ValueError: unknown claim, or intervals that are not those of its rule.
    """
    if claim_id not in CLAIMS:
        raise ValueError(f"unknown claim {claim_id!r}; registered: {', '.join(CLAIMS)}")
    rule = CLAIMS[claim_id].rule
    if isinstance(interval, Interval):
        if len(rule.intervals) > 1:
            raise ValueError(f"{claim_id} needs intervals named {list(rule.intervals)}")
        interval = {rule.intervals[0]: interval}
    return ClaimResult(claim_id, rule.verdict(interval), dict(interval))


def seeds_to_settle(interval: Interval, threshold: float = 0.0) -> int | None:
    """About how many seeds would settle on which side of the threshold the statistic lies.

    The smallest number whose interval excludes the threshold with a chance of 80%, if the truth is the present
    estimate; only the share of the variance that comes from seeds shrinks. None where no number of seeds would do:
    the estimate is on the threshold, or the remaining variance needs more prompts.
    """
    distance = abs(interval.estimate - threshold)
    share = interval.seed_share
    num_seeds = np.arange(max(2, interval.num_seeds), MAX_SEEDS + 1)
    std_error = interval.std_error * np.sqrt(share * interval.num_seeds / num_seeds + 1 - share)
    tail = 0.5 + interval.confidence / 2
    reach = (stats.t.ppf(tail, num_seeds - 1) + stats.t.ppf(POWER, num_seeds - 1)) * std_error
    enough = num_seeds[reach <= distance]
    return int(enough[0]) if len(enough) else None


def write_ledger(tier_root: str | os.PathLike) -> pd.DataFrame:
    """Collect every ``*/claims.json`` of a tier into its claims.csv and claims.md.

    Rows are sorted by claim and figure, one per interval of the rule. Both files are replaced atomically.

    Args:
        tier_root: the tier's results, such as results/laptop; ``<figure>/claims.json`` hold lists of results.

    Returns:
        The table as written to claims.csv.
    """
    tier_root = Path(tier_root)
    rows = []
    for path in sorted(tier_root.glob("*/claims.json")):
        for entry in json.loads(path.read_text()):
            rows += _rows(ClaimResult.from_json(entry), path.parent.name)
    rows.sort(key=lambda row: (row["claim"][0], int(row["claim"][1:]), row["figure"]))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    csv = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    replace_file(tier_root / "claims.csv", csv.encode())
    replace_file(tier_root / "claims.md", _markdown(table, tier_root.name).encode())
    return table


def ledger(tier_root: str | os.PathLike) -> pd.DataFrame:
    """Every test of every claim's rule, as ``*/claims.json`` of a tier have it.

    Returns:
        a row for each part of each rule: ``claim``, ``statement``, ``verdict``, ``figure``, ``interval`` (its name),
        ``estimate``, ``ci_low``, ``ci_high``, ``num_seeds``, ``num_prompts``, ``side``, ``threshold``, ``premise``,
        ``seeds_to_settle`` (None where more seeds would not do, or nothing is open), ``paper``.
    """
    rows = []
    for path in sorted(Path(tier_root).glob("*/claims.json")):
        for result in map(ClaimResult.from_json, json.loads(path.read_text())):
            claim = CLAIMS[result.claim_id]
            about = {"claim": claim.id, "statement": claim.statement, "verdict": result.verdict}
            for part in claim.rule.parts:
                interval = result.intervals[part.interval]
                is_open = part.verdict(interval) == "inconclusive" and result.verdict == "inconclusive"
                rows.append(
                    about
                    | {"figure": path.parent.name, "interval": part.interval, "estimate": interval.estimate}
                    | {"ci_low": interval.low, "ci_high": interval.high, "num_seeds": interval.num_seeds}
                    | {"num_prompts": interval.num_prompts, "side": part.side, "threshold": part.threshold}
                    | {"premise": part.premise, "paper": claim.paper}
                    | {"seeds_to_settle": seeds_to_settle(interval, part.threshold) if is_open else None}
                )
    return pd.DataFrame(sorted(rows, key=lambda row: (row["claim"][0], int(row["claim"][1:]))))


_COLUMNS = [
    "claim", "verdict", "statement", "statistic", "estimate", "ci_low", "ci_high", "ci_method", "num_seeds",
    "num_prompts", "rule", "seeds_to_settle", "paper", "figure",
]  # fmt: skip


def _rows(result: ClaimResult, figure: str) -> list[dict]:
    claim = CLAIMS[result.claim_id]
    rows = []
    for name in claim.rule.intervals:
        interval = result.intervals[name]
        parts = [part for part in claim.rule.parts if part.interval == name]
        undecided = [part for part in parts if interval.low <= part.threshold <= interval.high]
        part_open = result.verdict == "inconclusive" and bool(undecided)
        needed = [seeds_to_settle(interval, part.threshold) for part in undecided] if part_open else []
        settled = "more prompts" if None in needed else f"about {max(needed, default=0)}"
        statistic = claim.statistic if len(claim.rule.intervals) == 1 else f"{name}: {claim.statistic}"
        rows.append(
            {
                "claim": claim.id,
                "verdict": result.verdict,
                "statement": claim.statement,
                "statistic": statistic,
                "estimate": interval.estimate,
                "ci_low": interval.low,
                "ci_high": interval.high,
                "ci_method": interval.method,
                "num_seeds": interval.num_seeds,
                "num_prompts": interval.num_prompts,
                "rule": f"reproduced if the whole {interval.confidence:.0%} interval has {claim.rule.describe()}",
                "seeds_to_settle": settled if part_open else "",
                "paper": claim.paper,
                "figure": figure,
            }
        )
    return rows


def _markdown(table: pd.DataFrame, tier: str) -> str:
    counts = table.drop_duplicates(["claim", "figure"])["verdict"].value_counts()
    lines = [
        f"# Claims, {tier} tier",
        "",
        ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in VERDICTS) + ".",
        "",
        "| claim | verdict | estimate [interval] | seeds x prompts | figure |",
        "|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        number = f"{row.estimate:.3g} [{row.ci_low:.3g}, {row.ci_high:.3g}]"
        lines.append(
            f"| {row.claim}: {row.statement} | **{row.verdict}** | {number} | {row.num_seeds} x {row.num_prompts} "
            f"| [{row.figure}]({row.figure}/) |"
        )
    for row in table.itertuples():
        lines += ["", f"## {row.claim}: {row.verdict} ({row.figure})", "", f"- claim: {row.statement}"]
        lines += [f"- statistic: {row.statistic}", f"- rule: {row.rule}; contradicted if wholly on the other side"]
        lines += [f"- estimate: {row.estimate:.3g}, interval [{row.ci_low:.3g}, {row.ci_high:.3g}], {row.ci_method}"]
        lines += [f"- the paper: {row.paper or 'no figure known'}"]
        if row.seeds_to_settle:
            advice = {"more prompts": "more prompts are needed, more seeds alone would not do"}
            lines.append(f"- to settle it: {advice.get(row.seeds_to_settle, row.seeds_to_settle + ' seeds')}")
    return "\n".join(lines) + "\n"
