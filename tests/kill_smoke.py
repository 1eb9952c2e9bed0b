"""Kill the whole smoke tier with SIGKILL at random moments, run it again, and compare with an undisturbed run.

    python tests/kill_smoke.py --kills 10 --seed 0

Takes some minutes, so it is no part of the test suite, which does the same on toy stages (tests/test_grid.py). Linux
only: the processes of a run are found in /proc by a mark in their environment.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from rlhfscale.store import Store

TABLES = ("runs.csv", "summary.csv", "per_prompt.csv.gz")


def start(folder: Path, mark: str) -> subprocess.Popen:
    options = ["--tier", "smoke", "--store", str(folder / "store"), "--results", str(folder / "results")]
    return subprocess.Popen(
        [sys.executable, "-m", "rlhfscale.cli", "run", *options],
        env=os.environ | {"KILL_SMOKE_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_all(mark: str) -> int:
    """SIGKILL to every process that carries the mark: driver, workers, notebooks. Returns how many there were."""
    found = 0
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"KILL_SMOKE_MARK={mark}".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)
                found += 1
        except (OSError, ProcessLookupError):
            continue
    return found


def tables(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in TABLES:
        for path in sorted((folder / "results").rglob(name)):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as undisturbed, tempfile.TemporaryDirectory() as killed:
        begin = time.monotonic()
        assert start(Path(undisturbed), "none").wait() == 0
        whole = time.monotonic() - begin
        print(f"undisturbed run: {whole:.0f} s", flush=True)
        for kill in range(arguments.kills):
            mark = uuid.uuid4().hex
            start(Path(killed), mark)
            # each attempt continues where the last was killed, so moments within a third of a run cover all of it
            time.sleep(moment := rng.uniform(0, whole / 3))
            count = kill_all(mark)
            artifacts = sum(1 for _ in Store(Path(killed) / "store").artifacts())
            print(f"kill {kill + 1} after {moment:.1f} s: {count} processes, {artifacts} artifacts so far", flush=True)
        assert start(Path(killed), "none").wait() == 0
        store = Store(Path(killed) / "store")
        keys = [manifest["artifact"] for manifest in store.artifacts()]
        bad = [key for key in keys if not store.verify(key)]
        same = tables(Path(undisturbed)) == tables(Path(killed))
        print(f"{len(keys)} artifacts, {len(bad)} corrupted; tables {'identical' if same else 'DIFFERENT'}")
        sys.exit(bool(bad) or not same)


if __name__ == "__main__":
    main()
