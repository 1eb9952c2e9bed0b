"""The folder results/<tier>/<figure>/: tidy tables, figure, claims and manifest, written atomically.

Tables are sorted and printed with six significant digits, so a re-run that computes the same numbers writes the same
bytes. Figures are drawn from these tables alone.
"""

import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhfscale.models.files import replace_file
from rlhfscale.runs import paths
from rlhfscale.runs.provenance import provenance
from rlhfscale.study.rules import ClaimResult

RUNS_COLUMNS = ("figure", "command", "node", "rung", "num_params", "seed", "metric", "value", "num_prompts")
"""Required in runs.csv: one row per run x seed x metric. ``node`` is the artifact's key; conditions are further
columns, placed before ``seed``."""
SUMMARY_COLUMNS = ("quantity", "estimate", "ci_low", "ci_high", "ci_method", "num_seeds", "num_prompts")
"""Required in summary.csv: one row per estimate; conditions are further columns, placed after ``quantity``."""
PER_PROMPT_COLUMNS = ("node", "seed", "prompt_id", "metric", "value")
"""Required in per_prompt.csv.gz: the values behind the intervals."""
FLOAT_FORMAT = "%.6g"


class ResultsFolder:
    """The result files of one figure.

    Args:
        figure: the notebook's name, such as ``01_policy_size``.
        tier: name of the tier; default the environment's RLHFSCALE_TIER, else ``laptop``.
        root: folder that holds the tiers; default the environment's RLHFSCALE_RESULTS, else ``results`` in the
            project's root.
    """

    def __init__(self, figure: str, tier: str | None = None, root: str | os.PathLike | None = None):
        self.figure = figure
        self.tier = tier or paths.current_tier()
        self.root = Path(root) if root else paths.results_root()
        self.path = self.root / self.tier / figure
        self.path.mkdir(parents=True, exist_ok=True)

    def write_runs(self, runs: pd.DataFrame) -> Path:
        """Write runs.csv; columns: :data:`RUNS_COLUMNS` and conditions. ValueError: a column missing, a value NaN."""
        conditions = [c for c in runs.columns if c not in RUNS_COLUMNS]
        _require(runs, RUNS_COLUMNS, "runs")
        _require_finite(runs, "value", "runs")
        order = ["figure", "metric", "num_params", *conditions, "seed", "node"]
        columns = [*RUNS_COLUMNS[:5], *conditions, *RUNS_COLUMNS[5:]]
        return self.write_table("runs.csv", runs[columns].sort_values(order, kind="stable"))

    def write_summary(self, summary: pd.DataFrame) -> Path:
        """Write summary.csv; columns: :data:`SUMMARY_COLUMNS` and conditions. ValueError as :meth:`write_runs`."""
        conditions = [c for c in summary.columns if c not in SUMMARY_COLUMNS]
        _require(summary, SUMMARY_COLUMNS, "summary")
        _require_finite(summary, "estimate", "summary")
        columns = [SUMMARY_COLUMNS[0], *conditions, *SUMMARY_COLUMNS[1:]]
        return self.write_table("summary.csv", summary[columns].sort_values(["quantity", *conditions], kind="stable"))

    def write_per_prompt(self, values: pd.DataFrame) -> Path:
        """Write per_prompt.csv.gz; columns: :data:`PER_PROMPT_COLUMNS` and conditions."""
        _require(values, PER_PROMPT_COLUMNS, "per_prompt")
        _require_finite(values, "value", "per_prompt")
        conditions = [c for c in values.columns if c not in PER_PROMPT_COLUMNS]
        order = ["metric", *conditions, "seed", "node", "prompt_id"]
        text = _csv(values[[*conditions, *PER_PROMPT_COLUMNS]].sort_values(order, kind="stable"))
        return self._write("per_prompt.csv.gz", gzip.compress(text, mtime=0))

    def files(self) -> list[str]:
        """Names of the files in the folder."""
        return sorted(file.name for file in self.path.iterdir() if not file.name.startswith("."))

    def read(self, name: str) -> pd.DataFrame:
        """One of the tables, by file name."""
        return pd.read_csv(self.path / name)

    def write_figure(self, figure, name: str = "figure") -> list[Path]:
        """Write a matplotlib figure as ``name.png`` (150 dpi) and ``name.svg``; equal figures give equal bytes."""
        from matplotlib import rc_context

        written = []
        for suffix, about in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            with rc_context({"svg.hashsalt": "rlhfscale"}):
                figure.savefig(buffer, format=suffix, dpi=150, metadata=about)
            written.append(self._write(f"{name}.{suffix}", buffer.getvalue()))
        return written

    def write_claims(self, results: Sequence[ClaimResult]) -> Path:
        """Write claims.json."""
        return self._write_json("claims.json", [result.to_json() for result in results])

    def write_manifest(
        self,
        params: Mapping[str, Any],
        artifacts: Mapping[str, Mapping[str, Any]],
        *,
        command: str,
        seeds: Sequence[int],
        wall_s: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write manifest.json: what made this folder. Call it last, after runs.csv.

        Args:
            params: the figure's resolved parameters, as JSON values.
            artifacts: manifest of each artifact used, by key; its ``wall_s``, ``cpu_s`` and ``peak_memory_mib`` are
                kept.
            command: the command that made the figure.
            seeds: seeds of the runs.
            wall_s: seconds this call of the notebook took, warm or cold.
            extra: further facts, such as counts of dropped rows.
        """
        costs = {key: _cost(made) for key, made in sorted(artifacts.items())}
        runs = self.path / "runs.csv"
        manifest = {
            "figure": self.figure,
            "tier": self.tier,
            "command": command,
            "params": dict(params),
            "params_sha256": _sha256(json.dumps(dict(params), sort_keys=True).encode()),
            "runs_sha256": _sha256(runs.read_bytes()) if runs.exists() else None,
            "seeds": list(seeds),
            **provenance(),
            "artifacts": costs,
            "artifacts_wall_s": round(math.fsum(cost.get("wall_s") or 0 for cost in costs.values()), 3),
            "wall_s": None if wall_s is None else round(wall_s, 3),
            **(extra or {}),
        }
        return self._write_json("manifest.json", manifest)

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write a further table of the figure."""
        return self._write(name, _csv(table))

    def _write_json(self, name: str, value: Any) -> Path:
        return self._write(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def _write(self, name: str, content: bytes) -> Path:
        return replace_file(self.path / name, content)


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, float_format=FLOAT_FORMAT, lineterminator="\n").encode()


def _require(table: pd.DataFrame, columns: Iterable[str], name: str) -> None:
    missing = [c for c in columns if c not in table.columns]
    if missing:
        raise ValueError(f"{name} lacks the columns {missing}")
    if table.empty:
        raise ValueError(f"{name} has no rows")


def _require_finite(table: pd.DataFrame, column: str, name: str) -> None:
    bad = table.index[~table[column].map(lambda value: math.isfinite(value))]
    if len(bad):
        first = table.loc[bad[0]].to_dict()
        raise ValueError(f"{name} has {len(bad)} rows whose {column} is not finite, first: {first}")


def _cost(manifest: Mapping[str, Any]) -> dict[str, float]:
    return {name: manifest[name] for name in ("wall_s", "cpu_s", "peak_memory_mib") if name in manifest}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
