"""Four runs of the smoke tier at once, on one store: each artifact is made by one of them, and their tables are equal.

    python tests/drivers_smoke.py --json drivers.json
    python tests/drivers_smoke.py --figure 06

Takes some minutes, so it is no part of the test suite, which does the same on toy stages (tests/test_grid.py). Each run
reports what `grid.ensure` said of every node: ``done`` where one of its own workers computed it, ``cached`` where
another run had.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rlhfscale.runs.store import Store


def drive(report: Path, arguments: list[str]) -> None:
    """`rlhfscale` with these arguments in this process; the status of every node goes to a file."""
    from rlhfscale import cli
    from rlhfscale.runs import grid

    ensure = grid.ensure

    def recorded(*specs, **options):
        results = ensure(*specs, **options)
        report.write_text(json.dumps(results.status))
        return results

    grid.ensure = recorded
    cli.app(arguments)


def start(folder: Path, number: int, figures: list[str]) -> subprocess.Popen:
    where = ["--store", str(folder / "store"), "--results", str(folder / f"results-{number}")]
    wanted = [option for figure in figures for option in ("--figure", figure)]
    command = [sys.executable, __file__, "--drive", str(folder / f"report-{number}.json")]
    command += ["run", "--tier", "smoke", *where, *wanted]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def tables(results: Path) -> dict[str, bytes]:
    return {str(path.relative_to(results)): path.read_bytes() for path in sorted(results.rglob("*.csv*"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drivers", type=int, default=4)
    parser.add_argument("--figure", action="append", default=[], help="As of rlhfscale run; all by default.")
    parser.add_argument("--json", type=Path, help="File for the result.")
    arguments = parser.parse_args()
    begin, numbers = time.monotonic(), range(arguments.drivers)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        runs = [start(folder, number, arguments.figure) for number in numbers]
        codes = [run.wait() for run in runs]
        reports = [json.loads((folder / f"report-{number}.json").read_text()) for number in numbers]
        store = Store(folder / "store")
        keys = {manifest["artifact"] for manifest in store.artifacts()}
        made = Counter(key for report in reports for key, status in report.items() if status == "done")
        found = [tables(folder / f"results-{number}") for number in numbers]
        differing = {name for one in found for name in one if any(other.get(name) != one[name] for other in found)}
        result = {
            "drivers": arguments.drivers,
            "exit_codes": codes,
            "artifacts": len(keys),
            "made_by_driver": [sum(status == "done" for status in report.values()) for report in reports],
            "made_more_than_once": sum(count > 1 for count in made.values()),
            "made_by_nobody": len(keys - set(made)),
            "corrupted": sum(not store.verify(key) for key in keys) + len(list((store.root / "corrupt").glob("*"))),
            "tables": len(found[0]),
            "differing": sorted(differing),
            "wall_s": round(time.monotonic() - begin),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    shares = " + ".join(map(str, result["made_by_driver"]))
    print(
        f"{arguments.drivers} runs at once made {shares} of {len(keys)} artifacts,"
        f" {result['made_more_than_once']} more than once, {result['corrupted']} corrupted;"
        f" {result['tables']} tables each, {len(differing)} differ"
    )
    whole = sum(result["made_by_driver"]) == len(keys) > 0 and not result["made_by_nobody"] and not result["corrupted"]
    sys.exit(any(codes) or not whole or not found[0] or bool(differing))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
