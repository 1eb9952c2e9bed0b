"""The set-up is interrupted at random moments, and set up again: ``python tests/setup_smoke.py --interruptions 20``.

Each time `make plan TIER=smoke` starts in a clone without an environment, or with what the last round has left of
one. It is ended by SIGINT or SIGKILL, with all of its processes. Then it runs undisturbed, and must plan the smoke
tier. Every few rounds two start at once. It needs the network, or a cache of packages, and takes about a minute a
round.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMAND = ["make", "--no-print-directory", "plan", "TIER=smoke"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=20)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds; about what an undisturbed set-up takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, failed = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(prefix="rlhfscale-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for number in range(options.interruptions):
            if number % 2 == 0:  # else it goes on with what the last round has left
                shutil.rmtree(clone / ".venv", ignore_errors=True)
            else:
                (clone / "requirements" / "laptop.txt").open("a").write(f"# round {number}\n")  # so that there is work
            moment, how = rng.uniform(0.2, options.longest), rng.choice([signal.SIGINT, signal.SIGKILL])
            interrupt(clone, moment, how)
            outcome = run(clone, 2 if number % 5 == 4 else 1)
            failed += outcome != "ok"
            print(f"{number + 1}: {how.name} after {moment:.1f} s, then {outcome}", flush=True)
    print(f"{options.interruptions} interruptions, {failed} set-ups did not work afterwards")
    raise SystemExit(bool(failed))


def interrupt(clone: Path, moment: float, how: signal.Signals) -> None:
    """Start the command and end it, with every process it has started, after ``moment`` seconds."""
    process = start(clone)
    time.sleep(moment)
    with suppress(ProcessLookupError):  # it was quicker
        os.killpg(process.pid, how)
    process.communicate()


def run(clone: Path, at_once: int) -> str:
    """``ok`` where the command, or several of them at once, end well; else the last line of what one said."""
    processes = [start(clone) for _ in range(at_once)]
    outcomes = []
    for process in processes:
        text, _ = process.communicate()
        good = process.returncode == 0 and "01_policy_size" in text
        outcomes.append("ok" if good else " / ".join(text.strip().splitlines()[-2:]))
    return next((outcome for outcome in outcomes if outcome != "ok"), "ok")


def start(clone: Path) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(COMMAND, cwd=clone, **options)


if __name__ == "__main__":
    main()
