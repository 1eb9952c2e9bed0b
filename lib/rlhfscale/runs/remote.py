"""The far side of an artifact store at a URL: object storage, or any other file system that fsspec knows.

Below the URL lie ``<stage>/<key>.json``, an artifact's manifest, and ``<stage>/<key>/<attempt>/``, its files. An upload
writes the files below an attempt of its own, and last, in one put, the manifest that names the attempt. A reader thus
sees one whole artifact or none, also where an upload was killed or two machines upload the same artifact: the last
manifest counts, and what no manifest names is never read.

What comes from there is not trusted: names are checked before a file is written, and `runs.store.Store`
compares each file with its checksum before the artifact counts. Credentials are those that fsspec's file systems find
by themselves, in the environment or in files; a URL that holds any is refused.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from rlhfscale.runs.paths import FULL
from rlhfscale.runs.spec import key_of

MANIFEST = "manifest.json"
PAUSES_S = (1.0, 4.0)
"""Between attempts of a request, each of which the file system may repeat by itself (s3fs: for 8 seconds)."""
LISTING_S = 10.0
"""How long a listing of a stage is good for."""
AT_ONCE = 16
"""Requests or transfers at the same time."""
URL = re.compile(r"([a-z][a-z0-9+.-]*)://[^\s?#*\[\]]+")
LISTED = re.compile(r"((\w+)-[0-9a-f]{16})\.json", re.ASCII)
ATTEMPT = re.compile(r"[0-9a-f]{32}")
HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role; AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's account",
}

T, R = TypeVar("T"), TypeVar("R")


class StoreError(Exception):
    """The store cannot be read or written; the message names its folder or URL and says what to do, in one line."""


class Damaged(Exception):
    """What lies at the URL is not a whole artifact; the message says why."""


class Remote:
    """Artifacts below a URL.

    Args:
        url: such as ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``file:///folder``; nothing is opened before it
            is used.

    Raises:
        StoreError: here for a URL with credentials or characters that do not belong into it; by the methods where the
            URL cannot be read or written, after some attempts.
    """

    def __init__(self, url: str):
        scheme = url.partition("://")[0]
        if re.search("://.*@", url, re.DOTALL):
            raise StoreError(
                f"store {scheme}://...: it holds a name or password; leave it out, and give it where {scheme} looks"
                f" ({self._hint(scheme)})"
            )
        if not URL.fullmatch(url):
            raise StoreError(f"store {scheme}://...: not a URL such as s3://bucket/prefix, without ?, #, * or brackets")
        self.url, self.scheme = url.rstrip("/"), scheme
        self._listings: dict[str, tuple[float, set[str]]] = {}
        self._damaged: set[str] = set()

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        options = {"auto_mkdir": True} if self.scheme in ("file", "local") else {}
        try:
            return fsspec.core.url_to_fs(self.url, **options)[0]
        except ImportError as error:
            advice = "make setup EXTRAS=s3" if self.scheme == "s3" else str(error)
            raise StoreError(f"store {self.url}: what reads {self.scheme}:// is not installed: {advice}") from error
        except Exception as error:  # each file system has exceptions of its own
            raise self._refused("open it", error) from error

    @property
    def _base(self) -> str:
        return self._fs._strip_protocol(self.url).rstrip("/")

    def _at(self, key: str) -> str:
        return f"{self._base}/{key.rpartition('-')[0]}/{key}"

    # --- reading ---

    def lists(self, key: str) -> bool:
        """Whether there is a manifest of the artifact that has not been found damaged by this process. From a listing
        of its stage that is at most LISTING_S old."""
        return key not in self._damaged and key in self._listed(key.rpartition("-")[0])

    def keys(self) -> list[str]:
        """Every artifact that is there now, by stage and key."""
        self._listings.clear()
        stages = {path.rstrip("/").rpartition("/")[2] for path in self._ls(self._base)}
        return [key for stage in sorted(stages) for key in sorted(self._listed(stage))]

    def manifest(self, key: str) -> dict[str, Any] | None:
        """The artifact's manifest as it is there now, or None. Raises Damaged for what is no manifest of it."""
        found = self._read(key)
        return found and found[0]

    def download(self, key: str, folder: Path) -> bool:
        """Write the artifact's files and manifest into a folder, checksums not compared; False where there is none.

        Raises Damaged where the manifest is not one, names files outside the folder, or files that are not there.
        """
        found = self._read(key)
        if found is None:
            return False
        manifest, attempt = found
        near = {name: folder / name for name in manifest["files"]}
        for path in near.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if near:
            try:
                far = [f"{self._at(key)}/{attempt}/{name}" for name in near]
                self._try(f"download {key}", self._fs.get, far, [str(path) for path in near.values()])
            except FileNotFoundError:
                # the first to fail stops the others on their way
                there = [self._try(f"look for {key}", self._fs.exists, path) for path in far]
                missing = next((name for name, exists in zip(near, there, strict=True) if not exists), "a file")
                raise Damaged(f"{missing} is missing") from None
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
        self._note(key)
        return True

    def strike(self, key: str) -> None:
        """Do not list the artifact any more until it is uploaded again: it was found damaged."""
        self._damaged.add(key)

    def _read(self, key: str) -> tuple[dict[str, Any], str] | None:
        """The manifest as its maker wrote it, and the attempt that it names; None where there is none."""
        try:
            content = self._try(f"read {key}", self._fs.cat_file, f"{self._at(key)}.json")
        except FileNotFoundError:
            return None
        return _parse(content, key)

    def _listed(self, stage: str) -> set[str]:
        when, keys = self._listings.get(stage, (-LISTING_S, set()))
        if time.monotonic() - when >= LISTING_S:
            found = (LISTED.fullmatch(path.rpartition("/")[2]) for path in self._ls(f"{self._base}/{stage}"))
            keys = {match[1] for match in found if match and match[2] == stage}
            self._listings[stage] = time.monotonic(), keys
        return keys

    def _note(self, key: str) -> None:
        """The artifact is there now, whatever the listing says."""
        if listing := self._listings.get(key.rpartition("-")[0]):
            listing[1].add(key)

    def _ls(self, path: str) -> list[str]:
        self._fs.invalidate_cache()
        try:
            return self._try("list it", lambda: self._fs.ls(path, detail=False))
        except FileNotFoundError:
            return []

    # --- writing ---

    def upload(self, key: str, folder: Path) -> None:
        """Upload a whole artifact's files, then its manifest."""
        manifest = json.loads((folder / MANIFEST).read_text())
        attempt = uuid.uuid4().hex
        if names := list(manifest["files"]):
            near, far = [str(folder / name) for name in names], [f"{self._at(key)}/{attempt}/{name}" for name in names]
            self._write(f"upload {key}", self._fs.put, near, far)
        content = json.dumps({"attempt": attempt, **manifest}, indent=1, allow_nan=False) + "\n"
        self._write(f"upload {key}", self._put_whole, f"{self._at(key)}.json", content.encode())
        self._damaged.discard(key)
        self._note(key)

    def check_writable(self) -> None:
        """Raise StoreError unless a small object can be put below the URL and deleted."""
        probe = f"{self._base}/.probe.{uuid.uuid4().hex}"
        self._write("write to it", self._fs.pipe_file, probe, b"probe")
        self._write("delete from it", self._fs.rm_file, probe)

    def _put_whole(self, path: str, content: bytes) -> None:
        """One put, which object stores show as a whole; in a file system a rename."""
        if self.scheme not in ("file", "local"):
            self._fs.pipe_file(path, content)
            return
        temporary = f"{path}.{uuid.uuid4().hex}"
        self._fs.pipe_file(temporary, content)
        os.replace(temporary, path)

    # --- requests ---

    def _write(self, doing: str, function: Callable, *arguments: Any) -> None:
        try:
            self._try(doing, function, *arguments)
        except OSError as error:  # no such bucket; a full disk behind file://
            raise self._refused(doing, error) from error

    def _try(self, doing: str, function: Callable[..., R], *arguments: Any) -> R:
        """Call a file system's function, some times where it fails. A file that is missing and a disk that is full
        pass through; all else becomes a StoreError."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                return function(*arguments)
            except FileNotFoundError:
                raise
            except Exception as error:  # each file system has exceptions of its own
                if getattr(error, "errno", None) in FULL:
                    raise
                pause = next(pauses, None)
                if pause is None or isinstance(error, PermissionError):
                    raise self._refused(doing, error) from error
            time.sleep(pause)

    def _refused(self, doing: str, error: Exception) -> StoreError:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return StoreError(
            f"store {self.url}: cannot {doing}; check the address, the network and the credentials on this machine"
            f" ({self._hint(self.scheme)}) [{what}]"
        )

    @staticmethod
    def _hint(scheme: str) -> str:
        return HINTS.get(scheme, f"see fsspec's page on {scheme}")


def at_once(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map with several requests under way, in order."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(function, items)


def _parse(content: bytes, key: str) -> tuple[dict[str, Any], str]:
    """A manifest that describes the artifact and names files that stay in its folder, and its attempt; else Damaged."""
    try:
        manifest = json.loads(content)
        if key_of(manifest["spec"]) != key:
            raise Damaged("its manifest describes another artifact")
        attempt = manifest.pop("attempt")
        if not ATTEMPT.fullmatch(attempt):
            raise Damaged("its manifest names no attempt")
        names = manifest["files"].keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"unreadable manifest ({type(error).__name__})") from None
    for name in names:
        if not _stays_below(name, {*names, MANIFEST}):
            raise Damaged(f"its manifest names a file {name[:100]!r}")
    return manifest, attempt


def _stays_below(name: str, names: set[str]) -> bool:
    """Whether a file of this name lies in the artifact's folder, is no other file's folder, and is not its manifest."""
    path = PurePosixPath(name)
    odd = str(path) != name or path.is_absolute() or ".." in path.parts or any(len(part) > 200 for part in path.parts)
    nested = any(str(parent) in names for parent in path.parents)
    return not odd and not nested and name not in (".", MANIFEST) and not re.search(r"[\\\x00-\x1f]", name)
