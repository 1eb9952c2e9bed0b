"""The artifact store: each artifact is a folder named by the hash of what it was made from.

``root/<stage>/<key>/`` holds the stage's files and ``manifest.json``. An artifact is built in ``root/tmp/`` and renamed
into place when its manifest is written and everything is on disk, so a killed process or a lost power supply leaves a
whole artifact or none. Locks are ``flock`` locks, which the kernel frees when their holder dies.
"""

import errno
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhfscale.paths import store_root
from rlhfscale.spec import Spec

MANIFEST = "manifest.json"
RECORDED_PACKAGES = ("rlhfscale", "torch", "transformers", "peft", "numpy", "safetensors")
UNSEALED = {"artifact", "spec", "parents", "wall_s", "cpu_s", "peak_memory_mib", "packages", "created", "files"}
"""What the manifests of older stores hold: all but a hash of themselves."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class StoreError(Exception):
    """The store's folder cannot be written; the message names the folder and says what to do."""


class Store:
    """Artifacts under one root folder (default: :func:`rlhfscale.paths.store_root`).

    Cheap to make; several processes may use one root at once; reading needs no write access.
    """

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root).absolute() if root is not None else store_root()
        self._verified: dict[str, tuple] = {}
        self._locks: dict[str, FileLock] = {}

    def folder(self, key: str) -> Path:
        """Where the artifact is or would be."""
        return self.root / key.rpartition("-")[0] / key

    def has(self, key: str) -> bool:
        """Whether the artifact exists, unverified."""
        return (self.folder(key) / MANIFEST).is_file()

    def manifest(self, key: str) -> dict[str, Any]:
        """The artifact's manifest: spec, parents, files, costs and versions. Raises KeyError where it is missing."""
        if not self.has(key):
            raise KeyError(f"no artifact {key} in {self.root}")
        return json.loads((self.folder(key) / MANIFEST).read_text())

    def verify(self, key: str) -> bool:
        """Whether the artifact exists with every file's size and SHA-256 as recorded.

        A corrupt one (truncated, changed, without a manifest) is named in a warning and moved to ``root/corrupt/``, so
        that it counts as missing and is made again. Checked once in each process unless a file's size or time changes.
        """
        if not self.folder(key).exists():
            return False
        if self._problem(key) is None:
            return True
        with self.lock(key):  # another process may just have replaced it: look again before moving it aside
            if (problem := self._problem(key)) is None:
                return True
            if self.folder(key).exists():
                aside = self.root / "corrupt" / f"{key}.{uuid.uuid4().hex[:8]}"
                with self.writing():
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    self.folder(key).rename(aside)
                warnings.warn(f"corrupt artifact {key}: {problem}; moved to {aside}", stacklevel=2)
        return False

    def open(self, key: str) -> Path:
        """The folder of a verified artifact. Raises KeyError where it is missing or was corrupt."""
        if not self.verify(key):
            raise KeyError(f"no artifact {key} in {self.root}")
        return self.folder(key)

    def lock(self, key: str) -> FileLock:
        """The lock of one artifact, a context manager; the same thread may take it again while it holds it."""
        if key not in self._locks:
            with self.writing():
                (self.root / "locks").mkdir(parents=True, exist_ok=True)
            self._locks[key] = FileLock(self.root / "locks" / f"{key}.lock")
        return self._locks[key]

    @contextmanager
    def create(self, spec: Spec) -> Iterator[Path]:
        """A temporary folder to write the artifact into; published when the block ends, deleted on any exception.

        Takes the artifact's lock. Raises StoreError where the folder is not writable or the disk is full.
        """
        with self.writing(), self.lock(spec.key):
            temporary = self.root / "tmp" / f"{spec.key}.{uuid.uuid4().hex[:8]}"
            temporary.mkdir(parents=True)
            try:
                wall, cpu = time.perf_counter(), time.process_time()
                _reset_peak_memory()
                yield temporary
                manifest = {
                    "artifact": spec.key,
                    "spec": spec.describe(),
                    "parents": [parent.key for parent in spec.parents],
                    "wall_s": round(time.perf_counter() - wall, 3),
                    "cpu_s": round(time.process_time() - cpu, 3),
                    "peak_memory_mib": round(_peak_memory_mib(), 1),
                    "packages": _package_versions(),
                    "created": datetime.now(UTC).isoformat(timespec="seconds"),
                    "files": {
                        str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                        for path in sorted(temporary.rglob("*"))
                        if path.is_file()
                    },
                }
                (temporary / MANIFEST).write_bytes(_sealed(manifest))
                for path in (*temporary.rglob("*"), temporary):
                    _to_disk(path)
                self._publish(temporary, spec.key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of it after a rename

    def sweep(self) -> int:
        """Delete temporary folders whose maker has died (its lock is free); returns how many."""
        count = 0
        for folder in (self.root / "tmp").glob("*"):
            with suppress(Timeout), self.lock(folder.name.rpartition(".")[0]).acquire(blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
        return count

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written under the root; to be called before any compute."""
        with self.writing():
            probe = self.root / f".probe.{uuid.uuid4().hex[:8]}"
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"probe")
            finally:
                probe.unlink(missing_ok=True)

    def artifacts(self) -> Iterator[dict[str, Any]]:
        """The manifest of every artifact, by stage and key, unverified; unreadable ones are left out."""
        for path in sorted(self.root.glob(f"*/*-*/{MANIFEST}")):
            if path.parts[-3] not in ("tmp", "corrupt", "checkpoints"):
                with suppress(ValueError):
                    yield json.loads(path.read_text())

    def _publish(self, temporary: Path, key: str) -> None:
        target = self.folder(key)
        if self.verify(key):  # made in the meantime by a process that did not wait for the lock: keep the first
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(target)
        _to_disk(target.parent)

    def _problem(self, key: str) -> str | None:
        """What is wrong with an artifact's folder, or None where it verifies."""
        folder = self.folder(key)
        try:
            content = (folder / MANIFEST).read_bytes()
            manifest = json.loads(content)
            files = {name: (folder / name).stat() for name in manifest["files"]}
            stamp = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items())
            stamp += ((folder / MANIFEST).stat().st_mtime_ns,)
            if self._verified.get(key) == stamp:
                return None
            spec_hash = hashlib.sha256(json.dumps(manifest["spec"], sort_keys=True).encode()).hexdigest()
            if not key.endswith(spec_hash[:16]):
                return "its manifest describes another artifact"
            if content != (_plain(manifest) if set(manifest) == UNSEALED else _sealed(manifest)):
                return f"{MANIFEST} has changed"
            for name, recorded in manifest["files"].items():
                if files[name].st_size != recorded["bytes"]:
                    return f"{name} has {files[name].st_size} bytes instead of {recorded['bytes']}"
                if _sha256(folder / name) != recorded["sha256"]:
                    return f"{name} has changed"
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"unreadable {MANIFEST} ({type(error).__name__})"
        self._verified[key] = stamp
        return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn the operating system's refusals to write below the root into a StoreError."""
        try:
            yield
        except OSError as error:
            below_root = str(error.filename or "").startswith(str(self.root))
            if error.errno in FULL:
                advice = "the disk is full: free some space or choose another folder"
            elif error.errno in UNWRITABLE and below_root:
                advice = "the folder is not writable: change its permissions or choose another folder"
            else:
                raise
            raise StoreError(f"store {self.root}: {advice} (--store, RLHFSCALE_STORE) [{error.strerror}]") from error
        except Exception as error:
            if "os error 28" in str(error):  # safetensors reports a full disk in an exception class of its own
                raise StoreError(
                    f"store {self.root}: the disk is full: free some space or choose another folder "
                    "(--store, RLHFSCALE_STORE)"
                ) from error
            raise


@contextmanager
def scratch(artifact: Path) -> Iterator[Path]:
    """A folder beside a half-made artifact for its checkpoints: it outlives a killed process, so that the next one to
    make the artifact goes on from there, and is deleted once the block ends well.

    Args:
        artifact: the temporary folder that `Store.create` gave; its lock is held.
    """
    folder = artifact.parent.parent / "checkpoints" / artifact.name.rpartition(".")[0]
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as it is written: JSON with a hash of all else in it, since tables are made from its costs too."""
    content = {name: value for name, value in manifest.items() if name != "seal"}
    return _plain(content | {"seal": hashlib.sha256(_plain(content)).hexdigest()})


def _plain(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reset_peak_memory() -> None:
    with suppress(OSError):  # Linux only: workers live on, and each artifact should get its own peak
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
