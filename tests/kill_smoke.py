"""Kill a run of the smoke tier with SIGKILL at random moments, run it again each time, and compare its tables with
those of an undisturbed run.

    python tests/kill_smoke.py --kills 50 --json kills.json
    python tests/kill_smoke.py --kills 3 --figure 06

Takes about a quarter of an hour for 50 kills, so it is no part of the test suite, which does the same on toy stages
(tests/test_grid.py, tests/test_cli.py). Linux only: the processes of a run are found in /proc by a mark in their
environment.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from rlhfscale.runs.store import Store

TABLES = ("runs.csv", "summary.csv", "per_prompt.csv.gz")


def start(folder: Path, figures: list[str], mark: str = "none") -> subprocess.Popen:
    options = ["--tier", "smoke", "--store", str(folder / "store"), "--results", str(folder / "results")]
    for figure in figures:
        options += ["--figure", figure]
    return subprocess.Popen(
        [sys.executable, "-m", "rlhfscale.cli", "run", *options],
        env=os.environ | {"KILL_SMOKE_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(mark: str) -> int:
    """SIGKILL to every process that carries the mark: driver, workers, notebooks. Returns how many there were."""
    killed: set[str] = set()
    while True:  # what was started while we looked has the mark too
        found = set()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"KILL_SMOKE_MARK={mark}".encode() in environment.read_bytes():
                    os.kill(int(environment.parent.name), signal.SIGKILL)
                    found.add(environment.parent.name)
            except OSError:
                continue
        if not found:
            return len(killed)
        killed |= found


def tables(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in TABLES:
        for path in sorted((folder / "results").rglob(name)):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def num_artifacts(folder: Path) -> int:
    return sum(1 for _ in Store(folder / "store").artifacts())


def undisturbed(folder: Path, figures: list[str]) -> tuple[float, float]:
    """Seconds of a run, and of those until its first artifact."""
    begin, first = time.monotonic(), 0.0
    run = start(folder, figures)
    while run.poll() is None:
        time.sleep(0.1)
        if not first and num_artifacts(folder):
            first = time.monotonic() - begin
    assert run.returncode == 0, "the undisturbed run failed"
    return time.monotonic() - begin, first


def kill_again_and_again(folder: Path, arguments: argparse.Namespace, whole_s: float, first_s: float, num: int) -> dict:
    """Runs that continue one another, each killed at a random moment; together they should get through all the work."""
    rng, points, processes, finished = random.Random(arguments.seed), [], 0, 0
    while left := arguments.kills - len(points):
        share_s = whole_s * (1 - num_artifacts(folder) / num) / left
        moment, mark = rng.uniform(0, min(2 * (first_s + share_s), whole_s)) / 2**finished, uuid.uuid4().hex
        run = start(folder, arguments.figure, mark)
        try:
            run.wait(moment)
            assert run.returncode == 0, "a run that nobody killed failed"
            finished += 1  # before its moment: begin anew, and kill sooner
            for name in ("store", "results"):
                shutil.rmtree(folder / name)
        except subprocess.TimeoutExpired:
            processes += (count := kill_all(mark))
            run.wait()
            points.append(num_artifacts(folder))
            print(f"kill {len(points)} after {moment:.1f} s: {count} processes, {points[-1]} of {num}", flush=True)
    return {"kills": len(points), "processes_killed": processes, "finished_before": finished, "kill_points": points}


def remains(folder: Path) -> dict[str, int]:
    """What is left in store and results after a last run that nobody killed."""
    store = Store(folder / "store")
    keys = [manifest["artifact"] for manifest in store.artifacts()]
    aside = [path.name for path in (store.root / "corrupt").glob("*")]
    half = [*(store.root / "tmp").glob("*"), *(store.root / "checkpoints").glob("*")]
    half += [path for path in (folder / "results").rglob(".*") if path.is_file()]
    corrupted = aside + [key for key in keys if not store.verify(key)]
    return {"artifacts": len(keys), "corrupted": len(corrupted), "half_made": len(half)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", action="append", default=[], help="As of rlhfscale run; all by default.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        whole, killed = Path(whole), Path(killed)
        whole_s, first_s = undisturbed(whole, arguments.figure)
        num = num_artifacts(whole)
        print(f"undisturbed run: {whole_s:.0f} s, its first artifact after {first_s:.1f} s", flush=True)
        result = kill_again_and_again(killed, arguments, whole_s, first_s, num)
        assert start(killed, arguments.figure).wait() == 0, "the last run failed"
        result |= remains(killed)
        expected = tables(whole)
        result |= {"tables": len(expected), "identical": bool(expected) and tables(killed) == expected}
    result |= {"undisturbed_s": round(whole_s), "wall_s": round(time.monotonic() - begin)}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{result['kills']} kills of {result['processes_killed']} processes: {result['artifacts']} of {num} artifacts, "
        f"{result['corrupted']} corrupted, {result['half_made']} half made; "
        f"{result['tables']} tables {'identical' if result['identical'] else 'DIFFERENT'}"
    )
    good = result["identical"] and result["artifacts"] == num and not result["corrupted"] and not result["half_made"]
    sys.exit(not good)


if __name__ == "__main__":
    main()
