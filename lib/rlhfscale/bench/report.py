"""The benchmark's tables and figure: results/TIER/90_throughput, from the rows that `run.timed` returns."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhfscale.bench.cases import CASES
from rlhfscale.bench.rounds import CI_METHOD, median_interval
from rlhfscale.runs.paths import project_root
from rlhfscale.study import style

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


def study_cost(tier_root: Path) -> pd.DataFrame:
    """What the figures of a tier took, by stage, from the manifests of their results.

    Returns:
        by ``stage``, and ``all``: ``artifacts`` (different ones), ``asked_for`` (by how many figures in sum),
        ``wall_min`` and ``cpu_min`` in minutes of one worker, ``peak_memory_mib`` of the largest. Manifests name what
        was measured when an artifact was made, also where a later run found it in the store.
    """
    rows = []
    for file in sorted(tier_root.glob("*/manifest.json")):
        artifacts = json.loads(file.read_text())["artifacts"]
        rows += [{"stage": key.rsplit("-", 1)[0], "key": key} | cost for key, cost in artifacts.items()]
    table = pd.DataFrame(rows)
    once = table.drop_duplicates("key")
    costs = []
    for stage, of in [*once.groupby("stage"), ("all", once)]:
        asked = len(table) if stage == "all" else int((table["stage"] == stage).sum())
        minutes = {f"{kind}_min": of[f"{kind}_s"].sum() / 60 for kind in ("wall", "cpu")}
        costs.append({"stage": stage, "artifacts": len(of), "asked_for": asked, **minutes})
        costs[-1]["peak_memory_mib"] = of["peak_memory_mib"].max()
    return pd.DataFrame(costs)


def figure(table: pd.DataFrame) -> Figure:
    """The ratio of each case with its interval, and both sides' memory; from `summary`."""
    return style.throughput(table)


def markdown(table: pd.DataFrame) -> str:
    """The README's table."""
    lines = [
        "| case | peer | ours, CPU s | peer, CPU s | times as fast | rounds | memory, of the peer's | share of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        lines.append(
            f"| {row.case} | {row.peer} ({row.peer_dtype}) | {row.ours_s:.3g} ({row.ours_dtype}) | {row.peer_s:.3g} |"
            f" **{row.speed_ratio:.2f}** [{row.ci_low:.2f}, {row.ci_high:.2f}] | {row.num_rounds} |"
            f" {row.memory_ratio:.2f} |"
            f" {row.ours_share_of_peak:.2f} / {row.peer_share_of_peak:.2f} |"
        )
    return "\n".join(lines)


def _relative(folder: Path) -> str:
    """The folder below the project, where it is there."""
    root = project_root()
    return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)
