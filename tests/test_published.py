"""The metric code against published numbers (see published.py), where the reference data are at hand.

They are not part of the project: they are looked for in $RLHFSCALE_SHARED/benchmarks, else beside the project's root.
"""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

import published
from rlhfscale.runs.paths import project_root

SHARED = Path(os.environ.get("RLHFSCALE_SHARED") or project_root().parent / "shared")
BENCHMARKS = SHARED / "benchmarks"
needs_data = pytest.mark.skipif(
    not (BENCHMARKS / "expected.csv").is_file(),
    reason=f"no reference data at {BENCHMARKS}; set RLHFSCALE_SHARED to the folder that holds benchmarks/",
)


@needs_data
def test_every_published_number_is_reproduced(capsys):
    assert published.report(BENCHMARKS) == 0
    output = capsys.readouterr().out
    assert output.rstrip().endswith(" passed, 0 failed")
    assert "length-controlled fit of" in output and "200 bootstrap refits" in output


@needs_data
def test_every_recorded_label_is_reproduced():
    counts = published.parsers(BENCHMARKS)
    assert counts and all(same == count for _, same, count in counts)


@needs_data
def test_wrong_numbers_and_missing_files_fail_with_their_reason(tmp_path, capsys):
    folder = tmp_path / "other"
    shutil.copytree(BENCHMARKS, folder, copy_function=shutil.copyfile)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    rows = pd.read_csv(folder / "expected.csv")
    right = len(rows[rows["kind"] != "inferred"])
    rows.loc[0, "expected"] += 0.001
    extra = {
        "bench": "mt_bench",
        "model": "nobody",
        "metric": "average",
        "expected": 1,
        "kind": "published",
        "abs_tol": 1,
    }
    extras = [extra, extra | {"bench": "chess"}, extra | {"bench": "arena_hard_new"}]
    pd.concat([rows, pd.DataFrame(extras)]).to_csv(folder / "expected.csv", index=False)
    (folder / "mt_bench/judgments_pair.jsonl.gz").unlink()
    assert published.report(folder) == 1
    output = capsys.readouterr().out
    assert output.rstrip().endswith(f"{right - 3} passed, 6 failed")
    for reason in (
        "failed    alpaca_eval2",
        "has no rows of model 'nobody'",
        "unknown bench chess",
        "missing file mt_bench/judgments_pair.jsonl.gz",
        "missing file arena_hard/battles_new.jsonl.gz",
    ):
        assert reason in output


def test_a_folder_without_expected_csv_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["published.py", str(tmp_path)])
    assert published.main() == 2
    assert "expected.csv: no such file" in capsys.readouterr().err
    (tmp_path / "expected.csv").write_text("bench,model\n")
    assert published.main() == 2
    assert "lacks the columns metric, expected, kind, abs_tol" in capsys.readouterr().err


def test_rows_of_kind_inferred_are_not_judged_and_nan_does_not_pass(tmp_path, capsys):
    rows = ["bench,model,metric,expected,kind,abs_tol,note", "chess,a,b,1,inferred,0,", "chess,a,b,1,published,,"]
    (tmp_path / "expected.csv").write_text("\n".join(rows))
    assert published.report(tmp_path) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out
