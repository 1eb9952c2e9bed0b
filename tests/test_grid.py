"""The graph: what is cached, what runs, in which order; failures, crashes and interruptions."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlhfscale.runs import grid, pool
from rlhfscale.runs.grid import GridError, ensure, plan
from rlhfscale.runs.pool import PoolError
from rlhfscale.runs.store import Store, StoreError
from toy_stages import Number, Together, Total, read


def quiet() -> Console:
    return Console(record=True, file=open(os.devnull, "w"), width=200)


def run(specs, store, **options):
    return ensure(specs, store=store, **({"console": quiet(), "workers": 2} | options))


def lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def no_half_artifact(store: Store) -> None:
    assert list((store.root / "tmp").glob("*")) == []
    keys = [
        path.name for path in store.root.glob("*/*-*") if path.is_dir() and path.parent.name not in ("tmp", "corrupt")
    ]
    for key in keys:
        assert Store(store.root).verify(key), key  # a new Store: nothing remembered
    assert not (store.root / "corrupt").exists()


def diamond(trace: str = "", **options) -> Total:
    left = Total(parts=(Number(value=1, trace=trace),), trace=trace)
    right = Total(parts=(Number(value=1, trace=trace), Number(value=2, trace=trace)), trace=trace)
    return Total(parts=(left, right), trace=trace, **options)


def test_one_process_at_a_time_has_the_gpus(tmp_path, monkeypatch):
    """On a machine's own workers; what needs none goes on beside it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    store = Store(tmp_path / "s")
    on_gpus = [Number(value=value, gpus=1, sleep_s=0.5) for value in range(3)]
    plain = Number(value=9, sleep_s=1.0)
    spans, start = {}, pool.LocalPool.start

    def noted(self, spec):
        spans[spec] = [time.monotonic()]
        start(self, spec)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool.LocalPool, "start", noted)
        run([*on_gpus, plain], store, on_done=lambda spec, status: spans[spec].append(time.monotonic()))
    ordered = sorted(spans[spec] for spec in on_gpus)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ordered))
    assert spans[plain][0] < ordered[1][0]


def test_what_takes_more_gpus_than_the_machine_has_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    store, ready = Store(tmp_path), Number(value=1)
    with pytest.raises(PoolError, match=r"takes 2 GPUs of 2 machines, this machine has 0; run on a cluster by --ray"):
        run([ready, Together(part=Number(value=3), machines=2)], store)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(PoolError, match="takes 2 GPUs, this machine has 1"):
        run([ready, Together(part=Number(value=3))], store)
    assert not store.has(ready.key)


def test_a_graph_is_made_once_and_then_cached(tmp_path):
    store, trace = Store(tmp_path / "s"), tmp_path / "trace"
    top, seen = diamond(str(trace)), []
    todo = plan([top], store)
    assert [len(todo.to_run), len(todo.cached)] == [5, 0]
    results = run([top], store, on_done=lambda spec, status: seen.append((spec.key, status)))
    assert read(results[top]) == 4 and list(results) == [top]
    assert [status for _, status in seen] == ["done"] * 5
    order = [key for key, _ in seen]
    assert all(order.index(parent.key) < order.index(spec.key) for spec in top.walk() for parent in spec.parents)
    assert len(lines(trace)) == 5
    again = run([top], Store(tmp_path / "s"))
    assert again.status == {top.key: "cached"} and len(lines(trace)) == 5
    no_half_artifact(store)


def test_ancestors_of_a_cached_node_are_not_needed_but_corrupt_ones_that_are_get_made_again(tmp_path):
    store, trace = Store(tmp_path / "s"), tmp_path / "trace"
    number = Number(value=3, trace=str(trace))
    total = Total(parts=(number,), trace=str(trace))
    run([total], store)
    (store.folder(number.key) / "value.json").write_text("4")
    assert run([total], Store(tmp_path / "s")).status == {total.key: "cached"}
    doubled = Total(parts=(number, total), trace=str(trace))
    with pytest.warns(UserWarning, match=f"corrupt artifact {number.key}"):
        results = run([doubled], Store(tmp_path / "s"))
    assert read(results[doubled]) == 6
    assert results.status == {total.key: "cached", number.key: "done", doubled.key: "done"}


def test_workers_are_single_threaded_processes_of_their_own(tmp_path):
    spec = Total(parts=(), mood="threads", trace=str(tmp_path / "trace"))
    assert read(run([spec], Store(tmp_path / "s"))[spec]) == 1
    assert lines(tmp_path / "trace") != [f"{spec.key} {os.getpid()}"]


def test_earlier_groups_first_then_the_longest_chain(tmp_path):
    trace = str(tmp_path / "trace")
    late = [Number(value=value, trace=trace) for value in range(3)]
    short = Number(value=10, sleep_s=0.02, trace=trace)
    root = Number(value=11, sleep_s=0.01, trace=trace)
    chain = Total(parts=(root,), sleep_s=0.1, trace=trace)
    groups = {"first": [short, chain], "second": late}
    todo = plan(groups, Store(tmp_path / "s"), workers=1)
    assert todo.finish_s() == pytest.approx({"first": 0.13, "second": 0.16})
    assert todo.core_s == pytest.approx(0.16) and todo.wall_s == pytest.approx(0.16)
    assert plan(groups, Store(tmp_path / "s"), workers=2).wall_s == pytest.approx(0.11)
    run(groups, Store(tmp_path / "s"), workers=1)
    order = [line.split()[0] for line in lines(tmp_path / "trace")]
    assert order[:3] == [root.key, chain.key, short.key]
    assert set(order[3:]) == {spec.key for spec in late}


def test_a_failed_node_is_reported_its_dependants_skipped_the_others_finished(tmp_path):
    store, console = Store(tmp_path), quiet()
    bad = Total(parts=(Number(value=1),), mood="raise")
    above, top = Total(parts=(bad,)), Total(parts=(Total(parts=(bad,)), Number(value=5)))
    good = diamond()
    results = run([top, above, good], store, raise_on_failure=False, console=console)
    assert read(results[good]) == 4 and set(results) == {good}
    assert results.status[bad.key] == "failed" and results.status[top.key] == results.status[above.key] == "skipped"
    failure = results.failures[bad.key]
    assert failure.message == "ValueError: loss is NaN at step 3"
    assert "make_total" in failure.traceback
    assert "said before failing" in failure.log.read_text() and "make_total" in failure.log.read_text()
    with pytest.raises(KeyError, match="failed: ValueError: loss is NaN"):
        results[bad]
    assert console.export_text().count("loss is NaN at step 3") == 1
    with pytest.raises(GridError, match=r"1 failed, 2 skipped.*\n.*loss is NaN at step 3 \(log: .*\.log\)"):
        run([top, above], store)
    no_half_artifact(store)


def test_a_worker_that_dies_is_replaced_and_its_node_tried_once_more(tmp_path):
    store, trace, console = Store(tmp_path / "s"), tmp_path / "trace", quiet()
    once = Total(parts=(), mood="die once", trace=str(trace))
    slow = Number(value=1, sleep_s=1.0)
    results = run([once, slow], store, console=console)
    assert results.status == {once.key: "done", slow.key: "done"} and len(lines(trace)) == 2
    assert "retried" in console.export_text()
    always = Total(parts=(), mood="die", trace=str(trace))
    results = run([always, diamond()], store, raise_on_failure=False)
    assert "killed (signal 9" in results.failures[always.key].message
    assert results.status[diamond().key] == "done" and len(lines(trace)) == 4
    no_half_artifact(store)


def test_a_full_disk_stops_the_run_with_one_error(tmp_path):
    store = Store(tmp_path)
    full = Total(parts=(), mood="disk full")
    with pytest.raises(StoreError, match=f"{tmp_path}: the disk is full"):
        run([full, Total(parts=(full,)), Number(value=1)], store)
    no_half_artifact(store)


def test_an_unwritable_store_is_found_before_any_compute(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not writable"):
        run([Number(value=1)], Store(tmp_path / "file"))


DRIVER = textwrap.dedent("""
    import json, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
    from rich.console import Console
    from toy_stages import Number, Total
    from rlhfscale.runs.grid import ensure
    from rlhfscale.runs.store import Store
    from test_grid import many
    if __name__ == "__main__":
        try:
            ray = sys.argv[3] if len(sys.argv) > 3 else None
            results = ensure([many(sys.argv[2])], store=Store(sys.argv[1]), ray=ray, console=Console(file=sys.stderr))
        except KeyboardInterrupt:
            sys.exit(130)
        print(json.dumps(results.status))
""")


def many(trace: str) -> Total:
    numbers = [Number(value=value, sleep_s=0.3, trace=trace) for value in range(6)]
    pairs = tuple(Total(parts=(a, b), sleep_s=0.3, trace=trace) for a, b in itertools.pairwise(numbers))
    return Total(parts=pairs, trace=trace)


def drive(root: Path, trace: Path, *ray: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", DRIVER, str(root), str(trace), *ray]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def test_several_processes_asking_for_one_node_compute_it_once(tmp_path):
    drivers = [drive(tmp_path / "s", tmp_path / "trace") for _ in range(4)]
    outputs = [driver.communicate(timeout=60) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0, 0, 0], outputs
    made = [line.split()[0] for line in lines(tmp_path / "trace")]
    assert len(made) == len(set(made)) == len(list(many("").walk()))
    statuses = [json.loads(out) for out, _ in outputs]
    for key in made:  # the one that made it says so, and nobody else
        assert sorted(status.get(key, "cached") for status in statuses) == ["cached"] * 3 + ["done"]
    no_half_artifact(Store(tmp_path / "s"))


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_kill_9_of_driver_or_worker_at_random_points_then_the_same_content(tmp_path):
    root, trace, rng = tmp_path / "s", tmp_path / "trace", random.Random(0)
    for _ in range(4):
        driver = drive(root, trace)
        time.sleep(rng.uniform(0.6, 1.6))
        victims = [int(line.split()[1]) for line in lines(trace) if alive(int(line.split()[1]))]
        if victims and rng.random() < 0.5:
            os.kill(rng.choice(victims), signal.SIGKILL)
            time.sleep(0.1)
        driver.kill()
        driver.communicate()
    workers = {int(line.split()[1]) for line in lines(trace)}
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))  # orphans end by themselves
    store, top = Store(root), many(str(trace))
    assert read(run([top], store)[top]) == sum(a + b for a, b in itertools.pairwise(range(6)))
    no_half_artifact(store)


def test_what_a_kill_left_behind_goes_also_where_nothing_is_left_to_make(tmp_path):
    store = Store(tmp_path)
    run([Number(value=1)], store)
    (tmp_path / "tmp" / f"{Number(value=1).key}.aca50cae").mkdir()
    assert run([Number(value=1)], store).status == {Number(value=1).key: "cached"}
    no_half_artifact(store)


def test_ctrl_c_leaves_no_half_artifact_and_a_re_run_continues(tmp_path):
    root, trace = tmp_path / "s", tmp_path / "trace"
    driver = drive(root, trace)
    while len(lines(trace)) < 4:
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGINT)
    _, messages = driver.communicate(timeout=20)
    assert driver.returncode == 130
    assert "run again to continue" in messages and "Traceback" not in messages
    store = Store(root)
    no_half_artifact(store)
    finished = list(store.artifacts())
    assert 0 < len(finished) < len(list(many("").walk()))
    top = many(str(trace))
    results = run([top], store)
    assert results.status[top.key] == "done"
    made = [line.split()[0] for line in lines(trace)]
    assert all(made.count(manifest["artifact"]) == 1 for manifest in finished)


def test_progress_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhfscale.runs.progress.PLAIN_LINE_S", 0.3)
    console = quiet()
    run([Number(value=1, sleep_s=1.0)], Store(tmp_path), console=console)
    text = console.export_text()
    assert "0/1 done  1 under way" in text and "1/1 done  0 under way" in text and "left" in text


def test_a_live_line_on_a_terminal(tmp_path):
    console = Console(record=True, file=open(os.devnull, "w"), force_terminal=True, width=120)  # noqa: SIM115
    bad = Total(parts=(), mood="raise", sleep_s=0.7)
    run([Number(value=1, sleep_s=2.0), bad], Store(tmp_path), console=console, raise_on_failure=False)
    text = console.export_text()
    assert "0/2 done  2 under way" in text and "1/2 done  0 under way  1 failed, 0 skipped" in text


def test_no_progress_when_not_wanted_and_the_table_of_a_plan(tmp_path):
    console = quiet()
    store = Store(tmp_path)
    run([diamond()], store, console=console, progress=False)
    assert console.export_text() == ""
    console.print(plan([diamond(), Number(value=9)], store))
    console.print(grid.status(store))
    text = console.export_text()
    assert "total" in text and "core-minutes, about" in text and "MiB on disk" in text
    assert "text/html" in plan([diamond()], store)._repr_mimebundle_()


def test_groups_may_be_lists_too(tmp_path):
    todo = plan([[Number(value=1)], [Number(value=1), Number(value=2)]], Store(tmp_path))
    assert [node.group for node in todo.nodes.values()] == [0, 1]
