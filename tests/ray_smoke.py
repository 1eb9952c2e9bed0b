"""The whole smoke tier on a Ray cluster of two nodes on this machine: one is killed half-way, another joins, and the
tables are compared with those of worker processes.

    python tests/ray_smoke.py

Takes some minutes, so it is no part of the test suite, which does the same on toy stages (tests/test_ray.py). Needs
`make setup EXTRAS=ray`.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_smoke import tables
from rlhfscale.runs.store import Store


def start(folder: Path, *options: str) -> subprocess.Popen:
    where = ["--tier", "smoke", "--store", str(folder / "store"), "--results", str(folder / "results")]
    command = [sys.executable, "-m", "rlhfscale.cli", "run", *where, *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def made(folder: Path) -> int:
    return sum(1 for _ in Store(folder / "store").artifacts())


def cluster(nodes: int):
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    added = [found.add_node(num_cpus=1) for _ in range(nodes)]
    found.wait_for_nodes()
    return found, added


def killed_node() -> bool:
    """Whether a run that lost a node half-way has the tables of an undisturbed local one."""
    with tempfile.TemporaryDirectory() as local, tempfile.TemporaryDirectory() as on_ray:
        local, on_ray = Path(local), Path(on_ray)
        assert start(local).wait() == 0
        whole = made(local)
        ray, nodes = cluster(2)
        run = start(on_ray, "--ray", ray.address)
        while made(on_ray) < whole // 2:
            assert run.poll() is None, "it ended before half of it was made"
            time.sleep(0.2)
        ray.remove_node(nodes[1], allow_graceful=False)
        print(f"killed a node after {made(on_ray)} of {whole} artifacts", flush=True)
        ray.add_node(num_cpus=1)
        code = run.wait()
        ray.shutdown()
        store = Store(on_ray / "store")
        bad = [m["artifact"] for m in store.artifacts() if not store.verify(m["artifact"])]
        same = tables(local) == tables(on_ray)
        print(
            f"exit {code}; {made(on_ray)} artifacts, {len(bad)} corrupted; tables {'identical' if same else 'DIFFER'}"
        )
        return code == 0 and same and not bad and made(on_ray) == whole


if __name__ == "__main__":
    sys.exit(not killed_node())
