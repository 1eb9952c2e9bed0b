"""How much two workers do in the time of one: the artifacts of a tier, made by one worker and by two.

    python tests/throughput_smoke.py           the smoke tier, by worker processes
    python tests/throughput_smoke.py --ray     by nodes of a local Ray cluster, one core each
    python tests/throughput_smoke.py --ray --tier laptop --figure 04_prompt_vs_response_diversity

Takes minutes on an idle machine, so it is no part of the test suite. Efficiency is the time of one, divided by the
workers and by the time of two. It is given with the start of the workers, and from the first artifact on: each worker
imports for some seconds before, which is much of a smoke run and little of any other.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console

import rlhfscale.claims  # noqa: F401  (registers the figures)
from rlhfscale.runs import grid
from rlhfscale.runs.store import Store
from rlhfscale.study import runner


def seconds(specs: dict, folder: str, workers: int, on_ray: bool) -> tuple[float, float]:
    """Until all artifacts are made: from the start, and from the first artifact on."""
    made = []

    def done(spec, status) -> None:
        made.append(time.monotonic())

    where, nodes = {"workers": workers}, None
    if on_ray:
        from ray_smoke import cluster

        nodes, _ = cluster(workers)
        where = {"ray": nodes.address}
    begin = time.monotonic()
    grid.ensure(specs, store=Store(folder), console=Console(), on_done=done, **where)
    end = time.monotonic()
    if nodes:
        nodes.shutdown()
    return end - begin, end - made[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--tier", default="smoke")
    parser.add_argument("--figure", action="append", default=[])
    options = parser.parse_args()
    figures = runner.load_figures(options.tier, options.figure, Path("unused"))
    specs = {figure.name: figure.specs for figure in figures}
    took = {}
    for workers in (2, 1):
        with tempfile.TemporaryDirectory() as folder:
            took[workers] = seconds(specs, folder, workers, options.ray)
    for one, two, what in zip(
        took[1], took[2], ("with the start of the workers", "from the first artifact"), strict=True
    ):
        ratio = one / two
        print(f"{what}: one {one:.0f} s, two {two:.0f} s: {ratio:.2f} times as much, efficiency {ratio / 2:.2f}")


if __name__ == "__main__":
    main()
