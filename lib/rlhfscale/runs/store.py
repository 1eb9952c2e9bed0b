"""The artifact store: each artifact is a folder named by the hash of what it was made from.

``root/<stage>/<key>/`` holds the stage's files and ``manifest.json``. An artifact is built in ``root/tmp/`` and renamed
into place when its manifest is written and everything is on disk, so a killed process or a lost power supply leaves a
whole artifact or none. Locks are ``flock`` locks, which the kernel frees when their holder dies.

A store at a URL (see `runs.remote`) is such a folder on each machine, a cache, and the URL behind it: what
is missing in the cache is downloaded and verified, what is made is uploaded. Locks hold on one machine only; where two
make the same artifact at once, each has its own and the URL the last.
"""

import errno
import importlib.metadata
import json
import os
import resource
import shutil
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhfscale.models.files import plain_json, sealed, sha256
from rlhfscale.runs.paths import FULL, NotWritable, check_writable, is_url, store_location, store_root
from rlhfscale.runs.remote import MANIFEST, Damaged, Remote, StoreError, at_once
from rlhfscale.runs.spec import Spec, key_of

RECORDED_PACKAGES = ("rlhfscale", "torch", "transformers", "peft", "numpy", "safetensors")
UNSEALED = {"artifact", "spec", "parents", "wall_s", "cpu_s", "peak_memory_mib", "packages", "created", "files"}
"""What the manifests of older stores hold: all but a hash of themselves."""
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class Store:
    """Artifacts under one root folder, or at a URL with that folder as its cache.

    Cheap to make; several processes may use one root at once; reading needs no write access, but for a URL's cache.

    Args:
        location: a folder or a URL; by default `runs.paths.store_location`. Of a URL, the cache's folder is
            `runs.paths.store_root`.

    Raises:
        StoreError: for a URL that holds a password, or an empty location.
    """

    def __init__(self, location: str | Path | None = None):
        location = store_location() if location is None else str(location)
        if not location.strip():
            raise StoreError("store '': names no folder; give one, or leave it out for .store of the project (--store)")
        self.remote = Remote(location) if is_url(location) else None
        self.root = store_root(location)
        self._verified: dict[str, tuple] = {}
        self._locks: dict[str, FileLock] = {}

    @property
    def location(self) -> str:
        """What another process opens this store with."""
        return self.remote.url if self.remote else str(self.root)

    def folder(self, key: str) -> Path:
        """Where the artifact is or would be."""
        return self.root / key.rpartition("-")[0] / key

    def has(self, key: str) -> bool:
        """Whether the artifact exists, here or at the URL, unverified."""
        return self._is_here(key) or (self.remote is not None and self.remote.lists(key))

    def manifest(self, key: str) -> dict[str, Any]:
        """The artifact's manifest: spec, parents, files, costs and versions. Raises KeyError where it is missing."""
        if self._is_here(key):
            return json.loads((self.folder(key) / MANIFEST).read_text())
        with suppress(Damaged):
            if self.remote and (manifest := self.remote.manifest(key)):
                return manifest
        raise KeyError(f"no artifact {key} in {self.location}")

    def manifests(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Several at once, by key."""
        keys = list(keys)
        return dict(zip(keys, at_once(self.manifest, keys), strict=True))

    def available(self, key: str) -> bool:
        """Whether the artifact need not be made: it is verified here, or the URL lists it (from there it is verified
        once it is downloaded)."""
        return self._verify_here(key) or (self.remote is not None and self.remote.lists(key))

    def verify(self, key: str) -> bool:
        """Whether the artifact exists with every file's size and SHA-256 as recorded.

        A corrupt one (truncated, changed, without a manifest) is named in a warning and moved to ``root/corrupt/``, so
        that it counts as missing and is made again. Checked once in each process unless a file's size or time changes.
        One that is missing here and lies at the URL is downloaded; a corrupt one there is named in a warning too.
        """
        return self._verify_here(key) or (self.remote is not None and self._download(key))

    def _is_here(self, key: str) -> bool:
        return (self.folder(key) / MANIFEST).is_file()

    def _verify_here(self, key: str) -> bool:
        if not self.folder(key).exists():
            return False
        if self._problem(key, self.folder(key)) is None:
            return True
        with self.lock(key):  # another process may just have replaced it: look again before moving it aside
            if (problem := self._problem(key, self.folder(key))) is None:
                return True
            if self.folder(key).exists():
                aside = self.root / "corrupt" / f"{key}.{uuid.uuid4().hex[:8]}"
                with self.writing():
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    self.folder(key).rename(aside)
                warnings.warn(f"corrupt artifact {key}: {problem}; moved to {aside}", stacklevel=3)
        return False

    def _download(self, key: str) -> bool:
        """Whether the URL holds the artifact, which is then verified and here."""
        with self._temporary(key) as temporary:
            if self._verify_here(key):  # another process has downloaded it while this one waited for the lock
                return True
            try:
                if not self.remote.download(key, temporary):
                    return False
                if problem := self._problem(key, temporary):
                    raise Damaged(problem)
            except Damaged as problem:
                self.remote.strike(key)
                warnings.warn(f"corrupt artifact {key} at {self.location}: {problem}; not used", stacklevel=3)
                return False
            self._publish(temporary, key)
        return True

    def elsewhere(self, keys: Iterable[str]) -> list[str]:
        """Those of the artifacts that the URL lists and that are not here; none without a URL."""
        return [key for key in keys if self.remote and not self._verify_here(key) and self.remote.lists(key)]

    def fetch(self, keys: Iterable[str]) -> int:
        """Have these artifacts here too, several at a time; returns how many of them there are."""
        return sum(at_once(self.verify, keys))

    def share(self, keys: Iterable[str]) -> None:
        """Upload those of the verified artifacts that the URL does not list, as after an interrupted upload."""
        if self.remote:
            list(at_once(self._upload, [key for key in keys if self._is_here(key) and not self.remote.lists(key)]))

    def _upload(self, key: str) -> None:
        self.remote.upload(key, self.folder(key))

    def open(self, key: str) -> Path:
        """The folder of a verified artifact. Raises KeyError where it is missing or was corrupt."""
        if not self.verify(key):
            raise KeyError(f"no artifact {key} in {self.location}")
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

        Takes the artifact's lock. Raises StoreError where the folder is not writable, the disk is full, or the upload
        to the URL fails; the artifact is then kept here, for `share`.
        """
        with self._temporary(spec.key) as temporary:
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
                    str(path.relative_to(temporary)): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                    for path in sorted(temporary.rglob("*"))
                    if path.is_file()
                },
            }
            (temporary / MANIFEST).write_bytes(sealed(manifest))
            self._publish(temporary, spec.key)
            if self.remote:
                self._upload(spec.key)

    def sweep(self) -> int:
        """Delete temporary folders whose maker has died (its lock is free); returns how many: none of a store that can
        only be read."""
        count = 0
        for folder in (self.root / "tmp").glob("*"):
            with suppress(Timeout, StoreError), self.lock(folder.name.rpartition(".")[0]).acquire(blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
        return count

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written under the root, and at the URL; to be called before any
        compute."""
        try:
            check_writable(self.root, "store", "--store, RLHFSCALE_STORE")
        except NotWritable as error:
            raise StoreError(str(error)) from None
        if self.remote:
            self.remote.check_writable()

    def artifacts(self) -> Iterator[dict[str, Any]]:
        """The manifest of every artifact, by stage and key, with files unverified; one that is no manifest is named in
        a warning and left out. With a URL, of every artifact there."""
        yield from filter(None, at_once(self._readable, self.remote.keys() if self.remote else self._keys_here()))

    def _keys_here(self) -> list[str]:
        paths = sorted(self.root.glob(f"*/*-*/{MANIFEST}"))
        return [path.parts[-2] for path in paths if path.parts[-3] not in ("tmp", "corrupt", "checkpoints")]

    def _readable(self, key: str) -> dict[str, Any] | None:
        try:
            manifest = self.manifest(key)
            numbers = [file["bytes"] for file in manifest["files"].values()]
            numbers += [manifest["wall_s"], manifest["peak_memory_mib"]]
            if key_of(manifest["spec"]) == key and sum(numbers) >= 0:  # numbers they are
                return manifest
            problem = "it describes another artifact"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
        warnings.warn(f"damaged artifact {key}: unreadable {MANIFEST} ({problem})", stacklevel=2)
        return None

    @contextmanager
    def _temporary(self, key: str) -> Iterator[Path]:
        """An empty folder to make the artifact in, under its lock; deleted at the end unless it was published."""
        with self.writing(), self.lock(key):
            temporary = self.root / "tmp" / f"{key}.{uuid.uuid4().hex[:8]}"
            temporary.mkdir(parents=True)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # nothing is left of it after a rename

    def _publish(self, temporary: Path, key: str) -> None:
        for path in (*temporary.rglob("*"), temporary):
            _to_disk(path)
        target = self.folder(key)
        if self._verify_here(key):  # made in the meantime by a process that did not wait for the lock: keep the first
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(target)
        _to_disk(target.parent)

    def _problem(self, key: str, folder: Path) -> str | None:
        """What is wrong with an artifact in a folder, or None where it verifies."""
        try:
            content = (folder / MANIFEST).read_bytes()
            manifest = json.loads(content)
            files = {name: (folder / name).stat() for name in manifest["files"]}
            stamp = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files.items())
            stamp += ((folder / MANIFEST).stat().st_mtime_ns,)
            if self._verified.get(key) == stamp:
                return None
            if key_of(manifest["spec"]) != key:
                return "its manifest describes another artifact"
            if content != (plain_json(manifest) if set(manifest) == UNSEALED else sealed(manifest)):
                return f"{MANIFEST} has changed"
            for name, recorded in manifest["files"].items():
                if files[name].st_size != recorded["bytes"]:
                    return f"{name} has {files[name].st_size} bytes instead of {recorded['bytes']}"
                if sha256(folder / name) != recorded["sha256"]:
                    return f"{name} has changed"
        except (FileNotFoundError, NotADirectoryError) as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
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
