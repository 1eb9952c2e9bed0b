"""The ledger of a tier: the verdicts of all its figures in claims.csv and claims.md, and every test behind them."""

import json
import os
from pathlib import Path

import pandas as pd

from rlhfscale.models.files import replace_file
from rlhfscale.study.rules import CLAIMS, VERDICTS, ClaimResult, seeds_to_settle


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


def read(tier_root: str | os.PathLike) -> pd.DataFrame:
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
