"""How much two workers do in the time of one: the artifacts of the whole smoke tier, made by one worker and by two.

    python tests/throughput_smoke.py           worker processes
    python tests/throughput_smoke.py --ray     nodes of a local Ray cluster, one core each

Takes some minutes on an idle machine, so it is no part of the test suite. Efficiency is the time of one, divided by the
workers and by the time of two.
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console

from rlhfscale import grid, registry, runner  # noqa: F401  (the registry names the figures)
from rlhfscale.store import Store


def seconds(specs: dict, folder: str, workers: int, on_ray: bool) -> float:
    """Until all artifacts are made, the start of the workers included."""
    begin = time.monotonic()
    if not on_ray:
        grid.ensure(specs, store=Store(folder), workers=workers, console=Console())
        return time.monotonic() - begin
    import ray

    from ray_smoke import cluster

    nodes, _ = cluster(workers)
    begin = time.monotonic()
    grid.ensure(specs, store=Store(folder), ray=nodes.address, console=Console())
    took = time.monotonic() - begin
    ray.shutdown()
    nodes.shutdown()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true")
    on_ray = parser.parse_args().ray
    specs = {figure.name: figure.specs for figure in runner.load_figures("smoke", (), Path("unused"))}
    took = {}
    for workers in (2, 1):
        with tempfile.TemporaryDirectory() as folder:
            took[workers] = seconds(specs, folder, workers, on_ray)
            print(f"{workers} worker(s): {took[workers]:.0f} s", flush=True)
    ratio = took[1] / took[2]
    print(f"two do {ratio:.2f} times as much as one: efficiency {ratio / 2:.2f}")


if __name__ == "__main__":
    main()
