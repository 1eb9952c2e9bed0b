"""How fast are our trainers and samplers, in how much memory, against the library that one would otherwise use?

`rlhfscale bench` measures and writes the rows (see `rlhfscale.bench`); this figure only reads them.
"""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhfscale.bench import report
from rlhfscale.runs.paths import project_root
from rlhfscale.runs.spec import Spec
from rlhfscale.study import style
from rlhfscale.study.params import FigureParams, field


class Params(FigureParams):
    """Where the rows are."""

    figure: ClassVar[str] = report.NAME
    title: ClassVar[str] = "Speed and memory against the trainers and samplers that one would otherwise use"
    reads_results: ClassVar[bool] = True

    folder: str = field(role="fixed", doc="folder of the benchmark's tables, below the project")

    @property
    def path(self) -> Path:
        return project_root() / self.folder

    def specs(self) -> tuple[Spec, ...]:
        return ()


def measure(P: Params) -> pd.DataFrame:
    """A row for each case, see `report.summary`. Raises FileNotFoundError that says how to make the rows."""
    return report.summary(report.load(P.path))


def study_cost(P: Params) -> pd.DataFrame:
    """What the figures of the tier took, by stage, from the manifests of their results.

    Returns:
        by ``stage``, and ``all``: ``artifacts`` (different ones), ``asked_for`` (by how many figures in sum),
        ``wall_min`` and ``cpu_min`` in minutes of one worker, ``peak_memory_mib`` of the largest. Manifests name what
        was measured when an artifact was made, also where a later run found it in the store.
    """
    rows = []
    for file in sorted(P.path.parent.glob("*/manifest.json")):
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


@style.styled
def draw(summary: pd.DataFrame) -> Figure:
    """How much faster each benchmark case is than its peer, with its interval; and its share of the peer's memory.

    Args:
        summary: ``case``, ``speed_ratio``, ``ci_low``, ``ci_high``, ``memory_ratio``.
    """
    picture = style.Picture(figsize=(7.5, 0.9 + 0.42 * len(summary)), layout="constrained")
    speed, memory = picture.subplots(1, 2, sharey=True)
    place = np.arange(len(summary))[::-1]
    error = [summary.speed_ratio - summary.ci_low, summary.ci_high - summary.speed_ratio]
    speed.barh(place, summary.speed_ratio, xerr=error, color="tab:blue", height=0.6, capsize=3)
    speed.axvline(1, color="0.4", linewidth=1)
    speed.set_xlabel("times as fast as the peer")
    speed.set_yticks(place, summary.case)
    memory.barh(place, summary.memory_ratio, color="tab:orange", height=0.6)
    memory.axvline(1, color="0.4", linewidth=1)
    memory.set_xlabel("peak memory, of the peer's")
    return picture


def save(P: Params, picture: Figure) -> list[str]:
    """Write the figure beside the tables, and return the names of the files there."""
    for suffix in ("png", "svg"):
        picture.savefig(P.path / f"figure.{suffix}", dpi=150)
    return sorted(file.name for file in P.path.iterdir() if not file.name.startswith("."))


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
