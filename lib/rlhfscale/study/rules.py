"""Verdict rules: what a claim measures, and how an interval becomes reproduced, contradicted or inconclusive.

A rule is data. Each module of `rlhfscale.claims` registers its claim with its rule, committed before the runs:

    CLAIM = register(Claim(id=..., statement=..., paper=..., statistic=..., rule=Rule((Part("slope", "below"),))))
    CLAIM.judge(interval).verdict
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from scipy import stats

from rlhfscale.stats.bootstrap import Interval

Verdict = Literal["reproduced", "contradicted", "inconclusive"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "contradicted", "inconclusive")
POWER = 0.8
"""Chance of a conclusive interval at which :func:`seeds_to_settle` aims."""
MAX_SEEDS = 10_000


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
    """A letter and a number: C for the paper's claims, Q and N for questions beyond it."""
    statement: str
    """The claim in one line."""
    paper: str
    """The figure that the paper reports for it; empty where none is known."""
    statistic: str
    """What is estimated, with its unit."""
    rule: Rule
    """The verdict rule on the intervals of the statistic."""

    def judge(self, interval: Interval | Mapping[str, Interval]) -> "ClaimResult":
        """Apply the rule to the interval of the statistic, or, for a rule of several parts, to intervals by name.

        Raises ValueError where the intervals are not those of the rule.
        """
        names = self.rule.intervals
        if isinstance(interval, Interval):
            if len(names) > 1:
                raise ValueError(f"{self.id} needs intervals named {list(names)}")
            interval = {names[0]: interval}
        return ClaimResult(self.id, self.rule.verdict(interval), dict(interval))


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


CLAIMS: dict[str, Claim] = {}
"""Every registered claim by its identifier; `rlhfscale.claims` imports the modules that register them."""


def register(claim: Claim) -> Claim:
    """Add a claim to the registry, and return it. Raises ValueError where its identifier is taken."""
    if claim.id in CLAIMS:
        raise ValueError(f"claim {claim.id} is registered twice")
    CLAIMS[claim.id] = claim
    return claim


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
