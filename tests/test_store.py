"""The artifact store: whole artifacts or none, verified, with refusals of the disk named."""

import json
import os
import random
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rlhfscale.runs.store import MANIFEST, Store, StoreError
from rlhfscale.runs.worker import make
from toy_stages import Files, Number, Total


def fill(store: Store, spec: Number, text: str = "content") -> Path:
    with store.create(spec) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)
    return store.folder(spec.key)


def leftovers(store: Store) -> list[Path]:
    return list((store.root / "tmp").glob("*"))


def test_create_publishes_files_and_a_manifest(tmp_path):
    store, spec = Store(tmp_path), Total(parts=(Number(value=1), Number(value=2)))
    folder = fill(store, spec)
    assert folder == tmp_path / "total" / spec.key
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["spec"] == json.loads(json.dumps(spec.describe()))
    assert manifest["parents"] == [part.key for part in spec.parts]
    assert manifest["files"]["sub/a.txt"]["bytes"] == 7
    assert manifest["wall_s"] >= 0 and manifest["peak_memory_mib"] > 1
    assert store.has(spec.key) and store.verify(spec.key) and store.open(spec.key) == folder
    assert leftovers(store) == []
    assert [found["artifact"] for found in store.artifacts()] == [spec.key]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_block_that_raises(tmp_path, exception):
    store, spec = Store(tmp_path), Number(value=1)
    with pytest.raises(exception), store.create(spec) as folder:
        (folder / "half").write_text("half")
        raise exception
    assert not store.folder(spec.key).exists() and leftovers(store) == []
    with pytest.raises(KeyError, match=spec.key):
        store.open(spec.key)


def truncate(folder: Path) -> None:
    (folder / "sub" / "a.txt").write_text("cont")


def flip(folder: Path) -> None:
    (folder / "sub" / "a.txt").write_text("cantent")


def drop(folder: Path) -> None:
    (folder / "sub" / "a.txt").unlink()


def drop_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def other_spec(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["spec"]["fields"]["value"] = 7
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate, "4 bytes instead of 7"),
        (flip, "has changed"),
        (drop, "a.txt is missing"),
        (drop_manifest, "manifest.json is missing"),
        (cut_manifest, "unreadable manifest.json"),
        (other_spec, "describes another artifact"),
    ],
)
def test_a_damaged_artifact_is_named_moved_aside_and_made_again(tmp_path, damage, named):
    store, spec = Store(tmp_path), Number(value=1)
    damage(fill(store, spec))
    with pytest.warns(UserWarning, match=f"{spec.key}.*{named}"):
        assert not store.verify(spec.key)
    assert not store.has(spec.key)
    assert len(list((tmp_path / "corrupt").iterdir())) == 1
    assert list(store.artifacts()) == []
    fill(store, spec)
    assert store.verify(spec.key)


def flipped(content: bytes, place: float, flip: int) -> bytes:
    """The content with bits of one byte flipped; ``place`` is 0 for the first byte and 1 for the last."""
    at = round(place * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]


def damages(rng: random.Random, num_flips: int) -> Iterator[Callable[[bytes], bytes | None]]:
    """Ways to damage a file: flipped bits at its ends, its middle and at random, a byte less or more, half of it, no
    byte at all, no file."""
    for place in (0.0, 0.5, 1.0, *(rng.random() for _ in range(num_flips))):
        yield partial(flipped, place=place, flip=rng.randrange(1, 256))
    yield lambda content: content[:-1]
    yield lambda content: content + b"\n"
    yield lambda content: content[: len(content) // 2]
    yield lambda content: b""
    yield lambda content: None


@pytest.mark.filterwarnings("ignore:corrupt artifact")
def test_no_damage_to_any_file_goes_unnoticed_and_each_artifact_is_made_again(tmp_path):
    spec, rng, count = Files(), random.Random(0), 0
    assert make(spec, Store(tmp_path)) == "done"
    folder = Store(tmp_path).folder(spec.key)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 6 and MANIFEST in names
    for name in names:
        for damage in damages(rng, num_flips=300 if name == MANIFEST else 20):
            path = folder / name
            damaged = damage(path.read_bytes())
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert make(spec, Store(tmp_path)) == "done", (name, damaged)  # a new Store: nothing remembered
            assert Store(tmp_path).verify(spec.key)
            count += 1
    assert len(list((tmp_path / "corrupt").iterdir())) == count
    print(f"{count} corrupted artifacts, 0 accepted, {count} made again")


def test_a_newline_of_another_system_in_a_manifest_is_damage_too(tmp_path):
    store, spec = Store(tmp_path), Number(value=1)
    path = fill(store, spec) / MANIFEST
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r", 1))
    with pytest.warns(UserWarning, match="manifest.json has changed"):
        assert not store.verify(spec.key)


def test_a_manifest_without_a_hash_of_itself_counts_as_an_older_stores(tmp_path):
    store, spec = Store(tmp_path), Number(value=1)
    path = fill(store, spec) / MANIFEST
    manifest = json.loads(path.read_text())
    seal = manifest.pop("seal")
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    assert Store(tmp_path).verify(spec.key)
    path.write_text(json.dumps(manifest | {"sea": seal}, indent=1) + "\n")
    with pytest.warns(UserWarning, match="manifest.json has changed"):
        assert not Store(tmp_path).verify(spec.key)


def test_damage_after_a_first_check_is_seen(tmp_path):
    store, spec = Store(tmp_path), Number(value=1)
    folder = fill(store, spec)
    assert store.verify(spec.key)
    flip(folder)
    os.utime(folder / "sub" / "a.txt", ns=(1, 1))
    with pytest.warns(UserWarning, match="has changed"):
        assert not store.verify(spec.key)


def test_verifying_twice_reads_once(tmp_path, monkeypatch):
    store, spec = Store(tmp_path), Number(value=1)
    fill(store, spec)
    assert store.verify(spec.key)
    monkeypatch.setattr("rlhfscale.runs.store.sha256", lambda path: pytest.fail(f"read {path} again"))
    assert store.verify(spec.key)


def test_sweep_spares_a_living_maker_and_removes_a_dead_ones_folder(tmp_path):
    script = textwrap.dedent("""
        import os, sys
        from toy_stages import Number
        from rlhfscale.runs.store import Store
        with Store(sys.argv[1]).create(Number(value=1)) as folder:
            (folder / "half").write_text("half")
            print("ready", flush=True)
            sys.stdin.read()
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    maker = subprocess.Popen([sys.executable, "-c", script, tmp_path], **pipes)
    assert maker.stdout.readline() == b"ready\n"
    store = Store(tmp_path)
    assert store.sweep() == 0 and len(leftovers(store)) == 1
    maker.kill()
    maker.communicate()
    assert store.sweep() == 1 and leftovers(store) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    store, spec = Store(tmp_path), Number(value=1)
    with pytest.raises(StoreError, match=f"{tmp_path}.*disk is full"), store.create(spec):
        raise OSError(28, "No space left on device")
    assert not store.has(spec.key) and leftovers(store) == []
    with pytest.raises(StoreError, match="disk is full"), store.create(spec):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhfscale.runs.store._to_disk", full)  # the disk fills up while the manifest is written
    with pytest.raises(StoreError, match="disk is full"):
        fill(store, spec)
    assert not store.folder(spec.key).exists() and leftovers(store) == []


def test_a_file_over_the_size_limit_of_the_process_is_named(tmp_path):
    script = textwrap.dedent("""
        import resource, signal, sys
        from toy_stages import Number
        from rlhfscale.runs.store import Store, StoreError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            with Store(sys.argv[1]).create(Number(value=1)) as folder:
                (folder / "large").write_bytes(bytes(100_000))
        except StoreError as error:
            print(error)
    """)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True)
    assert "the disk is full" in done.stdout, done.stderr
    assert leftovers(Store(tmp_path)) == []


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file")
    for write in (store.check_writable, lambda: fill(store, Number(value=1))):
        with pytest.raises(StoreError, match=f"{tmp_path}/file: the folder is not writable.*--store"):
            write()


def test_a_read_only_root_is_named_but_can_be_read():
    """In a child process that gives up its privileges, since root may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        root, spec = Path(folder), Number(value=1)
        fill(Store(root), spec)
        for path in (root, *root.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                store = Store(root)
                assert store.open(spec.key)
                try:
                    store.check_writable()
                except StoreError as error:
                    code = 0 if "not writable" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for path in (root, *root.rglob("*")):
            path.chmod(0o755)


def test_other_errors_of_a_stage_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), Store(tmp_path).create(Number(value=1)):
        Path("/nowhere/at/all").read_text()
    with pytest.raises(PermissionError), Store(tmp_path).create(Number(value=1)):
        raise PermissionError(13, "Permission denied", "/elsewhere")
