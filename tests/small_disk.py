"""What a disk that is really full does to store, grid and command. Mounts small file systems, so tests/test_disk.py
runs it where it may: as root of a user namespace of its own.
"""

import gzip
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from rlhfscale.runs.store import Store, StoreError
from rlhfscale.runs.worker import make
from test_cli import call, project  # noqa: F401  (a fixture)
from test_grid import lines, no_half_artifact, run
from toy_stages import Files

PAGE = 4096
"""Bytes that a tmpfs hands out at once."""
BLOCKS, INODES = 512, 200


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 2 MiB and 200 files and folders."""
    found = tmp_path / "disk"
    found.mkdir()
    size = f"size={BLOCKS * PAGE},nr_inodes={INODES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", found], check=True)
    yield found
    subprocess.run(["umount", "--lazy", found], check=True)


@contextmanager
def full(disk: Path, free_blocks: int = 0, free_inodes: int = INODES) -> Iterator[None]:
    """Within this context the disk has no more room than this."""
    filler, stat = disk / "filler", os.statvfs(disk)
    filler.mkdir()
    (filler / "large").write_bytes(bytes(PAGE * (stat.f_bavail - free_blocks)))
    for number in range(os.statvfs(disk).f_favail - free_inodes):
        (filler / str(number)).touch()
    yield
    for path in filler.iterdir():
        path.unlink()
    filler.rmdir()


def test_a_run_stops_with_one_error_and_continues_when_there_is_room(disk, tmp_path):
    store, trace = Store(disk / "store"), tmp_path / "trace"
    specs = [Files(value=value, large_kib=100, trace=str(trace)) for value in range(8)]
    with full(disk, free_blocks=100):
        with pytest.raises(StoreError, match=f"{disk}/store: the disk is full"):
            run(specs, store)
        no_half_artifact(store)
        finished = {manifest["artifact"] for manifest in store.artifacts()}
        assert 0 < len(finished) < 8
        with pytest.raises(StoreError, match="the disk is full"):
            run(specs, store)
    results = run(specs, Store(disk / "store"))
    assert {key for key, status in results.status.items() if status == "cached"} >= finished
    made = [line.split()[0] for line in lines(trace)]
    assert all(made.count(key) == 1 for key in finished)
    no_half_artifact(store)


def made_or_full(spec: Files, store: Store) -> str:
    try:
        return make(spec, store)
    except StoreError as error:
        return "full" if "the disk is full" in str(error) else str(error)


def test_wherever_the_disk_becomes_full_there_is_a_whole_artifact_or_none(disk):
    """With room for one more page, or one more file, each time."""
    rooms = [{"free_blocks": pages} for pages in range(24)] + [
        {"free_blocks": BLOCKS // 2, "free_inodes": files} for files in range(16)
    ]
    outcomes = []
    for value, room in enumerate(rooms):
        store, spec = Store(disk / "store" / str(value)), Files(value=value)
        with full(disk, **room):
            outcomes.append(made_or_full(spec, store))
            no_half_artifact(store)
            assert store.has(spec.key) == (outcomes[-1] == "done")
        assert make(spec, Store(store.root)) == ("cached" if outcomes[-1] == "done" else "done")
        subprocess.run(["rm", "-r", store.root], check=True)
    for part in (outcomes[:24], outcomes[24:]):
        assert part[0] == "full" and part[-1] == "done" and part == sorted(part, reverse=True)


@pytest.mark.parametrize("free_inodes", [1, 2, 3, 4, 6, 8])
def test_a_worker_that_cannot_even_begin_says_that_the_disk_is_full(disk, free_inodes):
    """Its log, its lock or its folder cannot be made: that is no worker that was lost, and no stage that failed."""
    store, spec = Store(disk / "store"), Files()
    with full(disk, BLOCKS // 2, free_inodes):
        with pytest.raises(StoreError, match="the disk is full"):
            run([spec, Files(value=2)], store)
        no_half_artifact(store)
    assert run([spec], store).status == {spec.key: "done"}


LARGE = np.random.default_rng(0).random(20_000)


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: save_file({"weight": LARGE}, folder / "model.safetensors"),
        lambda folder: pd.DataFrame({"value": LARGE}).to_csv(folder / "values.csv"),
        lambda folder: (folder / "values.csv.gz").write_bytes(gzip.compress(LARGE.tobytes())),
        lambda folder: (folder / "text.json").write_text(str(LARGE.tolist())),
    ],
    ids=["safetensors", "csv", "gzip", "json"],
)
def test_every_writer_of_artifacts_reports_a_full_disk(disk, write):
    store, spec = Store(disk / "store"), Files()
    with full(disk, free_blocks=12):
        with pytest.raises(StoreError, match="the disk is full"), store.create(spec) as folder:
            write(folder)
        no_half_artifact(store)


@pytest.mark.parametrize("where", ["store", "results"])
def test_the_command_says_so_in_one_line_and_continues(disk, project, where):  # noqa: F811
    """A full disk below the store ends the run; below the results it fails the figures, whose artifacts are kept."""
    options = ["run", "--tier", "smoke", "--figure", "91", f"--{where}", str(disk / where)]
    results = (disk if where == "results" else project) / "results" / "smoke" / "91_toy"
    with full(disk, free_blocks=1):
        done = call(*options)
        errors = (
            done.stderr.splitlines() if where == "store" else [x for x in done.output.splitlines() if "failed" in x]
        )
        assert done.exit_code == (2 if where == "store" else 1) and len(errors) == 1, done.output + done.stderr
        assert ("the disk is full" if where == "store" else "No space left on device") in errors[0]
        assert not results.exists() or list(results.iterdir()) == []
        no_half_artifact(Store(disk / "store" if where == "store" else project / ".store"))
    done = call(*options)
    assert done.exit_code == 0, done.output + done.stderr
    assert (results / "runs.csv").read_text() == "value\n9\n10\n"
