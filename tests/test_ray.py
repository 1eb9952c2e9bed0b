"""The same grids on a Ray cluster of two nodes: same artifacts, lost nodes, clear errors."""

import _thread
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhfscale.runs import ray_team
from rlhfscale.runs.ray_pool import RayError, RayPool
from rlhfscale.runs.spec import Needs
from rlhfscale.runs.store import Store
from test_grid import alive, diamond, drive, lines, many, no_half_artifact, quiet, run
from toy_stages import Number, Together, Total, read

pytestmark = pytest.mark.xdist_group("ray")


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayError, match="make setup EXTRAS=ray"):
        RayPool(Store(tmp_path), "local", 1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray", reason="Ray is not installed: make setup EXTRAS=ray")
    from ray.cluster_utils import Cluster

    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):  # each with a cache of its own, for stores at a URL; the GPUs are there in name only
        variables = {"RLHFSCALE_CACHE": str(tmp_path_factory.mktemp("cache"))}
        found.add_node(num_cpus=1, num_gpus=1, env_vars=variables)
    yield found
    import ray

    ray.shutdown()
    found.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_a_graph_is_made_once_and_then_cached(cluster, tmp_path):
    store, trace = Store(tmp_path / "s"), tmp_path / "trace"
    top = diamond(str(trace))
    assert read(run([top], store, ray=cluster.address)[top]) == 4
    assert len(lines(trace)) == 5
    assert set(run([top], store, ray=cluster.address).status.values()) == {"cached"}
    assert read(run([top], Store(tmp_path / "local"))[top]) == 4
    no_half_artifact(store)


def test_a_failure_is_reported_and_the_others_go_on(cluster, tmp_path):
    bad = Total(parts=(Number(value=1),), mood="raise")
    results = run([Total(parts=(bad,)), diamond()], Store(tmp_path), ray=cluster.address, raise_on_failure=False)
    assert "loss is NaN at step 3" in results.failures[bad.key].message
    assert "said before failing" in results.failures[bad.key].log.read_text()
    assert results.status[diamond().key] == "done"
    no_half_artifact(Store(tmp_path))


def test_a_lost_worker_and_a_lost_node_lose_nothing(cluster, tmp_path):
    store, trace, console = Store(tmp_path / "s"), tmp_path / "trace", quiet()
    once = Total(parts=(), mood="die once", trace=str(trace))
    slow = [Number(value=value, sleep_s=1.5) for value in range(6)]
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    timer = threading.Timer(4.0, lambda: cluster.remove_node(doomed, allow_graceful=False))
    timer.start()
    results = run([once, *slow], store, ray=cluster.address, console=console)
    timer.join()
    assert set(results.status.values()) == {"done"} and len(lines(trace)) == 2
    assert "its Ray worker is gone" in console.export_text()
    no_half_artifact(store)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_driver_that_is_killed_leaves_nothing_running_and_a_second_one_goes_on(cluster, tmp_path):
    root, trace = tmp_path / "s", tmp_path / "trace"
    driver = drive(root, trace, cluster.address)
    while len(lines(trace)) < 4:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.05)
    driver.kill()
    driver.communicate()
    deadline = time.monotonic() + 20
    while any(alive(int(line.split()[1])) for line in lines(trace)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(int(line.split()[1])) for line in lines(trace))
    finished = [manifest["artifact"] for manifest in Store(root).artifacts()]
    top = many(str(trace))
    assert 0 < len(finished) < len(list(top.walk()))
    results = run([top], Store(root), ray=cluster.address)
    assert read(results[top]) == sum(a + b for a, b in itertools.pairwise(range(6)))
    made = [line.split()[0] for line in lines(trace)]
    assert all(made.count(key) == 1 for key in finished)
    no_half_artifact(Store(root))


def test_a_stage_that_takes_two_machines(cluster, tmp_path):
    store, trace = Store(tmp_path / "s"), tmp_path / "trace"
    spec = Together(part=Number(value=3), machines=2, trace=str(trace))
    assert read(run([spec], store, ray=cluster.address)[spec]) == 33
    assert {path.name for path in store.open(spec.key).glob("*.txt")} == {"0.txt"}
    assert len({line.split()[1] for line in lines(trace)}) == 2
    no_half_artifact(store)


@pytest.mark.parametrize(
    ("mood", "message"),
    [("raise", "process 1 of 2: ValueError: loss is NaN at step 3"), ("die", "process 1 of 2: ended with status -9")],
)
def test_a_process_that_fails_on_the_other_machine_ends_all(cluster, tmp_path, mood, message):
    bad, good = Together(part=Number(value=3), machines=2, mood=mood), Number(value=7)
    results = run([bad, good], Store(tmp_path), ray=cluster.address, raise_on_failure=False)
    assert message in results.failures[bad.key].message
    assert results.status[good.key] == "done"
    no_half_artifact(Store(tmp_path))


@pytest.mark.parametrize(
    ("lost", "words"), [("0", "its Ray worker is gone"), ("1", "another machine of its team is gone")]
)
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_stage_that_loses_one_of_its_machines_is_made_on_others(cluster, tmp_path, lost, words):
    """Only the machines of this test, one more than it takes, have the two cores that it asks of each."""
    store, trace, console = Store(tmp_path / "s"), tmp_path / "trace", quiet()
    spec = Together(part=Number(value=3), machines=2, cpus=2, mood="hang once", trace=str(trace))
    nodes = {}
    for _ in range(3):
        node = cluster.add_node(num_cpus=2, num_gpus=1)
        nodes[node.all_processes["raylet"][0].process.pid] = node
    cluster.wait_for_nodes()

    def kill_one_when_both_run() -> None:
        deadline = time.monotonic() + 300
        while len(lines(trace)) < 2:
            if time.monotonic() > deadline:
                _thread.interrupt_main()  # or the stage would hang for ever
                return
            time.sleep(0.1)
        time.sleep(1.0)  # until the first process waits for the second one
        (process,) = (int(pid) for rank, pid in map(str.split, lines(trace)) if rank == lost)
        (raylet,) = nodes.keys() & set(ancestors(process))
        cluster.remove_node(nodes.pop(raylet), allow_graceful=False)

    killer = threading.Thread(target=kill_one_when_both_run, daemon=True)
    killer.start()
    results = run([spec], store, ray=cluster.address, console=console)
    killer.join()
    for node in nodes.values():
        cluster.remove_node(node)
    assert read(results[spec]) == 33 and len(lines(trace)) == 4
    assert words in console.export_text()
    no_half_artifact(store)


def ancestors(pid: int) -> list[int]:
    """A process's parent, its parent, and so on."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_the_network_of_an_address_is_found():
    assert ray_team.interface_of("127.0.0.1") == "lo"
    assert ray_team.interface_of("203.0.113.7") is None


def test_gpus_that_no_machine_has_are_named_and_waited_for(cluster, tmp_path, monkeypatch):
    needs = {1: Needs(gpus=4), 2: Needs(gpus=32, machines=32), 3: Needs(gpus=1)}
    monkeypatch.setattr(Number, "needs", property(lambda spec: needs[spec.value]))
    pool = RayPool(Store(tmp_path), cluster.address, 1)
    try:
        with pytest.warns(UserWarning, match="it waits") as said:
            pool.check([Number(value=value) for value in (1, 2, 3, 2)])
        found = [str(warning.message).partition(": ")[2] for warning in said]
        assert found[0].startswith("takes 1 x 4 GPUs, and 0 machines of the cluster have 4")
        assert found[1].startswith("takes 32 x 1 GPUs, and ") and len(found) == 2
    finally:
        pool.stop()


def test_a_store_that_a_machine_cannot_see_is_refused(cluster, tmp_path, monkeypatch):
    from rlhfscale.runs import ray_pool

    monkeypatch.setattr(ray_pool, "_sees", lambda probe: False)
    with pytest.raises(RayError, match=f"cannot see the store {tmp_path}"):
        run([Number(value=1)], Store(tmp_path), ray=cluster.address)
    assert not list(tmp_path.glob(".probe*"))


def test_machines_that_share_nothing_but_a_url(cluster, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLHFSCALE_CACHE", str(tmp_path / "driver"))
    store = Store(f"file://{tmp_path}/far")
    numbers = [Number(value=value, sleep_s=0.5) for value in range(6)]
    pairs = tuple(Total(parts=(a, b)) for a, b in itertools.pairwise(numbers))
    top = Total(parts=pairs)
    assert read(run([top], store, ray=cluster.address)[top]) == 25
    here = [path.name for path in store.root.glob("*/*-*") if path.is_dir()]
    assert here == [top.key]  # the driver has what it asked for
    caches = [cache for cache in tmp_path_factory.getbasetemp().glob("cache[0-9]") if list(cache.glob("number/*"))]
    assert len(caches) == 2
    assert len(list(store.artifacts())) == 12


def test_a_machine_that_cannot_use_the_url_is_named(cluster, tmp_path, monkeypatch):
    from rlhfscale.runs import ray_pool

    monkeypatch.setenv("RLHFSCALE_CACHE", str(tmp_path / "driver"))
    monkeypatch.setattr(ray_pool, "_cannot_write", lambda location: f"store {location}: no credentials")
    with pytest.raises(RayError, match=f"--ray: .+: store file://{tmp_path}/far: no credentials"):
        run([Number(value=1)], Store(f"file://{tmp_path}/far"), ray=cluster.address)


def test_an_address_without_a_cluster_is_an_error_in_words(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: make setup EXTRAS=ray")
    code = "from rlhfscale.runs.ray_pool import *; from rlhfscale.runs.store import Store; import sys\n"
    code += "try: RayPool(Store(sys.argv[1]), '127.0.0.1:1', 1)\nexcept RayError as error: print('refused:', error)"
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert "refused: --ray 127.0.0.1:1: no Ray cluster answers there" in found.stdout, found.stderr
    assert time.monotonic() - start < 60
