"""Result folders: validated columns, identical bytes on rewrite, a manifest that says what made them."""

import gzip
import hashlib
import json

import numpy as np
import pandas as pd
import pytest

from rlhfscale.runs import provenance
from rlhfscale.stats.bootstrap import Interval, summary_row
from rlhfscale.study import results
from rlhfscale.study.results import ResultsFolder


def runs_table():
    rng = np.random.default_rng(0)
    rows = [
        {
            "figure": "01_policy_size", "command": "rlhfscale run", "node": f"policy-{rung}-{seed}", "rung": rung,
            "num_params": size, "stage": "ppo", "seed": seed, "metric": "sampled_exact", "value": rng.random(),
            "num_prompts": 512,
        }
        for rung, size in (("r2", 60_000), ("r1", 25_000))
        for seed in (1, 0)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def summary_table():
    interval = Interval(1 / 3, 0.1, 0.5, 0.1, "m", 5, 512, 100)
    return pd.DataFrame([summary_row("gain", interval, rung=rung) for rung in ("r2", "r1")])


@pytest.fixture
def folder(tmp_path):
    return ResultsFolder("01_policy_size", "smoke", tmp_path)


def test_rows_in_any_order_give_the_same_bytes(folder):
    runs, summary = runs_table(), summary_table()
    per_prompt = runs.assign(prompt_id=range(4))[["node", "seed", "prompt_id", "metric", "value"]]
    writers = (folder.write_runs, runs), (folder.write_summary, summary), (folder.write_per_prompt, per_prompt)
    for write, table in writers:
        first = write(table).read_bytes()
        assert write(table.iloc[::-1]).read_bytes() == first
    assert sorted(p.name for p in folder.path.iterdir()) == ["per_prompt.csv.gz", "runs.csv", "summary.csv"]


def test_tables_read_back(folder):
    runs = runs_table()
    folder.write_runs(runs)
    stored = folder.read("runs.csv")
    assert list(stored.columns) == [
        "figure", "command", "node", "rung", "num_params", "stage", "seed", "metric", "value", "num_prompts"
    ]  # fmt: skip
    assert stored["num_params"].tolist() == [25_000] * 2 + [60_000] * 2
    assert stored["seed"].tolist() == [0, 1, 0, 1]
    merged = stored.merge(runs, on="node")
    np.testing.assert_allclose(merged["value_x"], merged["value_y"], rtol=1e-5)
    folder.write_summary(summary_table())
    assert folder.read("summary.csv")["estimate"].tolist() == [0.333333] * 2
    folder.write_per_prompt(runs.assign(prompt_id=0)[[*results.PER_PROMPT_COLUMNS]])
    assert gzip.decompress((folder.path / "per_prompt.csv.gz").read_bytes()).startswith(b"node,seed,prompt_id")


@pytest.mark.parametrize("column", results.RUNS_COLUMNS)
def test_missing_columns_are_named(folder, column):
    with pytest.raises(ValueError, match=column):
        folder.write_runs(runs_table().drop(columns=column))


def test_nan_values_and_empty_tables_are_refused(folder):
    runs = runs_table()
    runs.loc[2, "value"] = np.nan
    with pytest.raises(ValueError, match=r"not finite.*policy-r1-1"):
        folder.write_runs(runs)
    with pytest.raises(ValueError, match="no rows"):
        folder.write_summary(summary_table().iloc[:0])
    assert not list(folder.path.iterdir())


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    path = folder.write_runs(runs_table())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        folder.write_runs(runs_table().assign(value=0.0))
    assert path.read_bytes() == before
    assert [p.name for p in folder.path.iterdir()] == ["runs.csv"]


def test_tier_and_root_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHFSCALE_RESULTS", str(tmp_path))
    monkeypatch.delenv("RLHFSCALE_TIER", raising=False)
    assert ResultsFolder("a").path == tmp_path / "laptop" / "a"
    monkeypatch.setenv("RLHFSCALE_TIER", "gpu")
    assert ResultsFolder("a").path == tmp_path / "gpu" / "a"


def test_manifest_says_what_made_the_folder(folder):
    artifact = {"wall_s": 2.5, "cpu_s": 2.0, "peak_memory_mib": 300, "log": "x"}
    runs = folder.write_runs(runs_table())
    params = {"seeds": [0, 1], "rungs": ["r1", "r2"]}
    path = folder.write_manifest(
        params, {"policy-1": artifact}, command="rlhfscale run --tier smoke", seeds=[0, 1], wall_s=3.25
    )
    manifest = json.loads(path.read_text())
    assert manifest["runs_sha256"] == hashlib.sha256(runs.read_bytes()).hexdigest()
    assert manifest["artifacts"] == {"policy-1": {"wall_s": 2.5, "cpu_s": 2.0, "peak_memory_mib": 300}}
    assert manifest["artifacts_wall_s"] == 2.5
    assert manifest["wall_s"] == 3.25
    assert manifest["params"] == params
    assert manifest["seeds"] == [0, 1]
    assert manifest["packages"]["numpy"] == np.__version__
    assert manifest["cpu"]
    assert manifest["cpu_cores"] >= 1
    again = folder.write_manifest(dict(reversed(params.items())), {}, command="c", seeds=[0, 1])
    assert json.loads(again.read_text())["params_sha256"] == manifest["params_sha256"]


def test_manifest_works_without_git(folder, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    manifest = json.loads(folder.write_manifest({}, {}, command="c", seeds=[0]).read_text())
    assert manifest["git_commit"] is None
    assert manifest["git_dirty"] is None
