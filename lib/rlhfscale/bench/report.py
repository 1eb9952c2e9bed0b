"""The benchmark's tables: results/TIER/90_throughput, from the rows that `run.timed` returns."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rlhfscale.bench.cases import CASES
from rlhfscale.bench.rounds import CI_METHOD, median_interval
from rlhfscale.runs.paths import project_root

NAME = "90_throughput"
COMMAND = "make bench"


def save(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write rows.json, and runs.csv and summary.csv made from it, in the order of `cases.CASES`; rows of other cases
    that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.json"
    kept = {row["case"]: row for row in (json.loads(file.read_text()) if file.exists() else [])}
    kept |= {row["case"]: row for row in rows}
    order = [*CASES, *kept]
    rows = sorted(kept.values(), key=lambda row: order.index(row["case"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    runs(rows).to_csv(folder / "runs.csv", index=False)
    summary(rows).to_csv(folder / "summary.csv", index=False)


def load(folder: Path) -> list[dict[str, Any]]:
    """The saved rows. Raises FileNotFoundError that says how to make them."""
    file = folder / "rows.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no benchmark yet; make it with: {COMMAND}")
    return json.loads(file.read_text())


def execute_notebook(folder: Path) -> None:
    """Execute the notebook on the tables of ``folder`` and keep it there."""
    import papermill

    with contextlib.chdir(project_root()):  # relative paths: the executed notebook records them, and is committed
        target = _relative(folder)
        papermill.execute_notebook(
            f"notebooks/{NAME}.ipynb",
            f"{target}/notebook.ipynb",
            {"folder": target},
            kernel_name="python3",
            progress_bar=False,
        )


def runs(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each case, side and round: wall and CPU seconds."""
    return pd.DataFrame(
        {"case": row["case"], "side": row[side]["name"], "round": number, "seconds": wall, "cpu_seconds": cpu}
        for row in rows
        for side in ("ours", "peer")
        for number, (wall, cpu) in enumerate(
            zip(row[side]["seconds_by_round"], row[side]["cpu_seconds_by_round"], strict=True)
        )
    )


def cpu_ratios(row: dict[str, Any]) -> np.ndarray:
    """The peer's CPU seconds over ours, by round: unlike wall time, hardly moved by what else the machine does."""
    return np.array(row["peer"]["cpu_seconds_by_round"]) / np.array(row["ours"]["cpu_seconds_by_round"])


def summary(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row for each case: seconds, the ratio with its interval, memory, and the share of the product peak."""
    return pd.DataFrame(_summary(row) for row in rows)


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    ratios = cpu_ratios(row)
    low, high, coverage = median_interval(ratios)
    return {
        "case": row["case"],
        "peer": row["peer"]["name"],
        "ours_s": float(np.median(row["ours"]["cpu_seconds_by_round"])),
        "peer_s": float(np.median(row["peer"]["cpu_seconds_by_round"])),
        "speed_ratio": float(np.median(ratios)),
        "ci_low": low,
        "ci_high": high,
        "ci_method": f"{CI_METHOD} of the rounds' CPU seconds, an interval of the median",
        "ci_coverage": coverage,
        "num_rounds": len(ratios),
        "ours_dtype": row["ours"]["dtype"],
        "peer_dtype": row["peer"]["dtype"],
        "ours_peak_mib": row["ours"]["peak_rss_mib"],
        "peer_peak_mib": row["peer"]["peak_rss_mib"],
        "memory_ratio": row["ours"]["peak_rss_mib"] / row["peer"]["peak_rss_mib"],
        **{f"{side}_share_of_peak": _share(row, side) for side in ("ours", "peer")},
        "threads": row["threads"],
        "command": COMMAND,
    }


def _share(row: dict[str, Any], side: str) -> float:
    """FLOPs of a step for each CPU second, as a share of the measured product peak in that side's precision."""
    peak = row["matmul_peak_flops_per_s"][row[side]["dtype"]]
    return row[side]["flops"] / float(np.median(row[side]["cpu_seconds_by_round"])) / peak


def _relative(folder: Path) -> str:
    """The folder below the project, where it is there."""
    root = project_root()
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
