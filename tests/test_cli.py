"""The command line, in a toy project: exit codes, one-line errors, and figures made end to end by papermill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

import rlhfscale
import toy_stages
from rlhfscale.cli import app
from rlhfscale.runs.store import Store
from rlhfscale.study import runner
from rlhfscale.study.params import ParamsError
from test_grid import alive, lines, no_half_artifact

PARAMETERS = 'seeds = [1, 2]\nbest_of = 4\nlr = 0.1\nmood = ""'
BODY = """
import json
import pandas as pd
from toy_stages import {schema}, read
from rlhfscale.runs import grid
from rlhfscale.study.results import ResultsFolder

P = {schema}(seeds=seeds, best_of=best_of, lr=lr, mood=mood)
runs = grid.ensure(P.specs())
assert set(runs.status.values()) == {{"cached"}}
values = [read(runs[spec]) for spec in P.specs()]
folder = ResultsFolder(P.figure)
folder.write_table("runs.csv", pd.DataFrame({{"value": values}}))
claim = dict(claim="T1", statement="sums grow", estimate=values[-1], ci_low=1.0, ci_high=9.0, verdict="reproduced")
(folder.path / "figure.png").touch()
(folder.path / "claims.json").write_text(json.dumps([claim]))
"""


def write_notebook(path: Path, parameters: str, body: str) -> None:
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}
    )
    book.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="parameters"),
        nbformat.v4.new_code_cell(body, id="body"),
    ]
    nbformat.write(book, path)


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two toy figures, current folder and library path set, toy schemas in place of the real ones."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "rlhfscale"\n')
    for folder in ("params/smoke", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    for name, schema in (("91_toy", "ToyParams"), ("92_other", "OtherParams")):
        (tmp_path / "params" / "smoke" / f"{name}.yaml").write_text("seeds: [5, 6]\nlr: 0.2\n")
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", PARAMETERS, BODY.format(schema=schema))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setitem(sys.modules, "rlhfscale.claims", toy_stages)
    for name in ("RLHFSCALE_STORE", "RLHFSCALE_RESULTS", "RLHFSCALE_TIER"):
        monkeypatch.delenv(name, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def start_run() -> subprocess.Popen:
    """`rlhfscale run` of the first toy figure, in a process of its own."""
    script = textwrap.dedent("""
        import sys, toy_stages
        sys.modules["rlhfscale.claims"] = toy_stages
        from rlhfscale.cli import app
        app()
    """)
    command = [sys.executable, "-c", script, "run", "--tier", "smoke", "--figure", "91"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_run_makes_the_figures_and_again_from_the_cache(project):
    stale = project / "results" / "smoke" / "91_toy" / f".notebook.{dead_pid()}.ipynb"
    stale.parent.mkdir(parents=True)
    stale.write_text("half-written by a run that was killed")
    done = call("run", "--tier", "smoke")
    assert done.exit_code == 0, done.output + done.stderr
    for name in ("91_toy", "92_other"):
        folder = project / "results" / "smoke" / name
        assert (folder / "runs.csv").read_text() == "value\n9\n10\n"
        assert not list(folder.glob(".notebook*"))
        assert re.search(rf"landed {name} after .* min: results/smoke/{name}/figure.png", done.output)
        text = (folder / "notebook.ipynb").read_text()
        assert "seeds = [5, 6]" in text and str(project) not in text
    assert "2 figures: 5 artifacts to make, 0 cached" in done.output
    assert "T1 reproduced  sums grow: 10 [1, 9]" in done.output
    start = time.monotonic()
    again = call("run", "--tier", "smoke", "--figure", "91")
    assert again.exit_code == 0 and "1 figures: 0 artifacts to make, 2 cached" in again.output
    assert "92_other" not in again.output and time.monotonic() - start < 30


def test_a_store_at_a_url_gives_another_machine_the_same_tables_without_compute(project, monkeypatch):
    options = ["run", "--tier", "smoke", "--figure", "91", "--store", f"file://{project}/far"]
    folder = project / "results" / "smoke" / "91_toy"
    for machine, line in (("a", "5 artifacts to make, 0 cached"), ("b", "0 artifacts to make, 2 cached")):
        monkeypatch.setenv("RLHFSCALE_CACHE", str(project / machine))
        done = call(*options)
        assert done.exit_code == 0 and line in done.output, done.output + done.stderr
        assert (folder / "runs.csv").read_text() == "value\n9\n10\n"
        assert str(project) not in (folder / "notebook.ipynb").read_text()
        shutil.rmtree(folder)
    assert "5" in call("status", "--store", f"file://{project}/far").output
    assert not (project / ".store").exists()


def test_a_failed_figure_is_reported_and_the_other_one_lands(project):
    (project / "params" / "smoke" / "91_toy.yaml").write_text("mood: raise\nseeds: [5]\n")
    write_notebook(project / "notebooks" / "92_other.ipynb", PARAMETERS, "raise RuntimeError('no plot')")
    (project / "params" / "smoke" / "93_third.yaml").write_text("seeds: [5]\n")
    write_notebook(project / "notebooks" / "93_third.ipynb", PARAMETERS, BODY.format(schema="ThirdParams"))
    done = call("run", "--tier", "smoke")
    assert done.exit_code == 1
    assert "ValueError: loss is NaN at step 3" in done.output and "failed 91_toy: " in done.output
    assert re.search(r"failed 92_other: RuntimeError: no plot \(log: .*92_other.log\)", done.output)
    assert "landed 93_third" in done.output
    assert not (project / "results" / "smoke" / "91_toy").exists()
    assert list((project / "results" / "smoke" / "92_other").iterdir()) == []


NO_TIERS = ("../params/smoke", "/tmp", "accelerate", "", "../smoke", "smoke/", "smoke/.", ".")


@pytest.mark.parametrize(
    ("arguments", "change", "message"),
    [
        (["run", "--tier", "none"], None, "tier: unknown tier 'none'; allowed: smoke"),
        (["run", "--figure", "07"], None, "unknown figure '07' in tier smoke; allowed: 91_toy, 92_other"),
        (["run"], "num_promts: 3", "params/smoke/91_toy.yaml: num_promts: unknown parameter; allowed: seeds, best_of"),
        (["plan"], "seeds: []", "params/smoke/91_toy.yaml: seeds: list must not be empty"),
        (["run"], "best_of: 2.5", "params/smoke/91_toy.yaml: best_of: "),
        *((["run", "--tier", tier], None, f"unknown tier {tier!r}; allowed: smoke\n") for tier in NO_TIERS),
        (["claims", "--tier", "../smoke"], None, "unknown tier '../smoke'; allowed: smoke\n"),
        (["bench", "--tier", "../smoke"], None, "unknown tier '../smoke'; allowed: smoke\n"),
        (
            ["run", "--store", "pyproject.toml"],
            None,
            "pyproject.toml: the folder is not writable: change its permissions or",
        ),
        (["run", "--store", "/proc/x"], None, "store /proc/x: the folder is not writable: change its permissions or"),
        (["run", "--store", ""], None, "store '': names no folder; give one"),
        (["status", "--store", " "], None, "store '': names no folder; give one"),
        (["run", "--results", ""], None, "--results: names no folder"),
        (
            ["run", "--results", "/dev/null/x"],
            None,
            "results /dev/null/x: the folder is not writable: change its",
        ),
        (
            ["run", "--store", "https://token@host/x"],
            None,
            "store https://...: it holds a name or password; leave it out",
        ),
        (
            ["run", "--store", "s3://id:pass@bucket/x"],
            None,
            "store s3://...: it holds a name or password; leave it out",
        ),
        (["status", "--store", "nothing://bucket"], None, "store nothing://bucket: cannot open it"),
        (["claims"], None, "no verdicts yet"),
    ],
)
def test_bad_input_is_one_line_on_standard_error_and_exit_2(project, arguments, change, message):
    if change:
        (project / "params" / "smoke" / "91_toy.yaml").write_text(change)
    done = call(*arguments, *(() if {"--tier", "status"} & {*arguments} else ("--tier", "smoke")))
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not any("token" in text for text in (done.output, done.stderr))
    assert not [*project.glob(".store/*/*"), *project.glob("results/*")]


@pytest.mark.parametrize("number", ["91", "91_toy"])
def test_figures_are_found_by_number(project, number):
    assert "92_other" not in call("plan", "--tier", "smoke", "--figure", number).output


def test_a_figure_below_ten_needs_no_zero(project):
    (project / "params" / "smoke" / "91_toy.yaml").rename(project / "params" / "smoke" / "06_toy.yaml")
    assert runner.figure_names("smoke", ["6"]) == runner.figure_names("smoke", ["06"]) == ["06_toy"]
    with pytest.raises(ParamsError, match="unknown figure '9'"):
        runner.figure_names("smoke", ["9"])


def test_more_workers_than_cores_are_warned_of(project):
    done = call("run", "--tier", "smoke", "--figure", "91", "--workers", "1000")
    assert done.exit_code == 0 and "--workers 1000: this machine has" in done.stderr


def test_the_version():
    done = call("--version")
    assert done.exit_code == 0 and done.output == f"rlhfscale {rlhfscale.__version__}\n"


DAMAGED = ("[]", '"text"', "{}", '{"spec": 3}', '{"spec": {"stage": []}}', "\x00", "[" * 5000)


def test_status_names_damaged_artifacts_and_counts_the_rest(project):
    assert call("run", "--tier", "smoke", "--figure", "91").exit_code == 0
    for index, text in enumerate(DAMAGED):
        folder = project / ".store" / "number" / f"number-{index:016x}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    done = call("status")
    assert done.exit_code == 0 and re.search(r"all +│ +5 ", done.output), done.output
    for index in range(len(DAMAGED)):
        assert f"damaged artifact number-{index:016x}: unreadable manifest.json (" in done.stderr


def test_links_to_other_notebooks_lead_to_executed_ones(project):
    write_notebook(project / "notebooks" / "91_toy.ipynb", PARAMETERS, BODY.format(schema="ToyParams"))
    book = json.loads((project / "notebooks" / "91_toy.ipynb").read_text())
    book["cells"].append(
        {"cell_type": "markdown", "metadata": {}, "id": "links", "source": ["see [it](92_other.ipynb#a)"]}
    )
    (project / "notebooks" / "91_toy.ipynb").write_text(json.dumps(book))
    assert call("run", "--tier", "smoke", "--figure", "91").exit_code == 0
    text = (project / "results" / "smoke" / "91_toy" / "notebook.ipynb").read_text()
    assert "see [it](../92_other/notebook.ipynb#a)" in text and "](92" not in text


def test_a_notebook_that_disagrees_is_found_before_any_compute(project):
    write_notebook(project / "notebooks" / "92_other.ipynb", PARAMETERS + "\nnum_extra = 1", "")
    done = call("run", "--tier", "smoke")
    assert done.exit_code == 2 and "notebooks/92_other.ipynb: num_extra: unknown parameter" in done.stderr
    assert not (project / ".store").exists()


def test_plan_status_claims_and_help(project):
    done = call("plan", "--tier", "smoke")
    assert done.exit_code == 0 and re.search(r"91_toy.*T1.*0.*3", done.output) and "core-minutes" in done.output
    assert not (project / ".store").exists()
    (project / "params" / "smoke" / "order.yaml").write_text("- 92_other\n- 91_toy\n")
    done = call("plan", "--tier", "smoke")
    assert done.output.index("92_other") < done.output.index("91_toy")
    (project / "params" / "smoke" / "order.yaml").write_text("- 92_other\n")  # the other is made when it is asked for
    assert "91_toy" not in call("plan", "--tier", "smoke").output
    assert "91_toy" in call("plan", "--tier", "smoke", "--figure", "91").output
    for bad in ("- 92_other\n- 90_none\n", "- 92_other\n- 92_other\n", "92_other"):
        (project / "params" / "smoke" / "order.yaml").write_text(bad)
        assert call("plan", "--tier", "smoke").exit_code == 2
    assert f"store {project}/.store" in call("status").output
    (project / "results" / "smoke").mkdir(parents=True)
    (project / "results" / "smoke" / "claims.md").write_text("# Claims\nall fine\n")
    assert "all fine" in call("claims", "--tier", "smoke").output
    for command in ("run", "plan", "status", "claims"):
        done = call(command, "--help")
        assert done.exit_code == 0 and "--" in done.output
    assert call("run", "--tier").exit_code == 2 and call("bogus").exit_code == 2


def test_interrupted_run_exits_130_and_leaves_nothing_half_made(project):
    write_notebook(project / "notebooks" / "91_toy.ipynb", PARAMETERS, "import time; time.sleep(60)")
    process = start_run()
    results = project / "results" / "smoke" / "91_toy"
    deadline = time.monotonic() + 30
    while not list(results.glob(".notebook*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors == "interrupted\n"
    assert list(results.iterdir()) == []
    assert not list((project / ".store" / "tmp").glob("*"))


SLOW = """
import os, signal
from pathlib import Path
import pandas as pd
from toy_stages import Number, ToyParams, read
from rlhfscale.runs import grid
from rlhfscale.study.results import ResultsFolder

P = ToyParams(seeds=seeds, best_of=best_of, lr=lr, mood=mood)
Path("notebook").write_text(f"{os.getpid()} {os.getppid()}")
runs = grid.ensure([Number(value=value, sleep_s=1.0, trace="trace") for value in range(6)])
if DIES_WRITING and not Path("died").exists():
    Path("died").touch()
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
ResultsFolder(P.figure).write_table("runs.csv", pd.DataFrame({"value": [read(folder) for folder in runs.values()]}))
"""


def gone(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("victim", ["kernel", "kernel that writes", "papermill", "driver"])
def test_kill_9_while_a_notebook_runs_then_the_same_tables(project, victim):
    """The notebook computes, its kernel, papermill or the run is killed: one line says so, what was made is kept,
    nothing goes on behind it or is left half-written, and a second run completes."""
    body = SLOW.replace("DIES_WRITING", str(victim == "kernel that writes"))
    write_notebook(project / "notebooks" / "91_toy.ipynb", PARAMETERS, body)
    results, trace = project / "results" / "smoke" / "91_toy", project / "trace"
    run = start_run()
    if victim != "kernel that writes":
        while len(lines(trace)) < 4:  # two workers: two artifacts are made
            assert run.poll() is None
            time.sleep(0.05)
        kernel, papermill = map(int, (project / "notebook").read_text().split())
        os.kill({"kernel": kernel, "papermill": papermill, "driver": run.pid}[victim], signal.SIGKILL)
    output, errors = run.communicate(timeout=30)
    pids = [int(pid) for pid in (project / "notebook").read_text().split()]
    assert gone([*pids, *(int(line.split()[1]) for line in lines(trace))], within_s=10)
    assert not (results / "runs.csv").exists()
    if victim == "driver":
        assert run.returncode == -signal.SIGKILL
    else:
        reason = "its process was ended by signal 9" if victim == "papermill" else ".*Kernel died"
        assert run.returncode == 1 and errors == ""
        assert re.search(rf"\nfailed 91_toy: {reason} \(log: .*\n$", output) and output.count("failed") == 1
        assert list(results.iterdir()) == []
    store = Store(project / ".store")
    finished = [manifest["artifact"] for manifest in store.artifacts()]
    assert len(finished) >= 7 and all(map(store.verify, finished))
    again = start_run()
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 0, output + errors
    assert sorted(path.name for path in results.iterdir()) == ["notebook.ipynb", "runs.csv"]
    assert (results / "runs.csv").read_text() == "value\n0\n1\n2\n3\n4\n5\n"
    made = [line.split()[0] for line in lines(trace)]
    assert all(made.count(key) == 1 for key in finished if key in made) and len(set(made)) == 6
    no_half_artifact(store)


def test_the_command_line_does_not_import_torch():
    heavy = "[name for name in ('torch', 'transformers', 'pandas') if name in sys.modules]"
    code = f"import rlhfscale.cli, sys; print(json.dumps({heavy}))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert json.loads(done.stdout) == []
