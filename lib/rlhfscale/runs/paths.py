"""Where things are: the project's root, the artifact store and the results, for notebooks and the command line alike.

The command line sets ``RLHFSCALE_STORE``, ``RLHFSCALE_RESULTS`` and ``RLHFSCALE_TIER`` for the notebooks it runs, so
that their library calls agree with its options; a reader in JupyterLab has none of them and gets the defaults.
"""

import errno
import hashlib
import os
import re
from pathlib import Path

GPU_VARIABLE = "RLHFSCALE_GPU"
"""Names the kind of GPU that stages are placed on, see `planning.hardware`; passed on to every worker."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the operating system answers where there is no room."""


class NotWritable(Exception):
    """A folder that cannot be written; the message names it and the option that chooses another, in one line."""


def check_writable(folder: Path, what: str, option: str, *, keep: bool = True) -> None:
    """Make a folder and try a file in it, to be called before any compute. Unless ``keep``, what was made is removed.

    Raises NotWritable: ``what`` is said to lie there, and ``option`` to choose another place.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
        for path in () if keep else made:
            path.rmdir()
    except OSError as error:
        full = error.errno in FULL
        advice = "the disk is full: free some space" if full else "the folder is not writable: change its permissions"
        raise NotWritable(f"{what} {folder}: {advice} or choose another ({option}) [{error.strerror}]") from None


def without_secrets(url: str) -> str:
    """A URL without user information, query and fragment, which may hold passwords and keys: fit to be printed."""
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def project_root() -> Path:
    """The nearest folder at or above the current one whose pyproject.toml names rlhfscale, else the source checkout.

    Raises FileNotFoundError where neither is such a folder (a package installed without its checkout).
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[3]):
        project = folder / "pyproject.toml"
        if project.is_file() and re.search(r'^name\s*=\s*"rlhfscale"', project.read_text(), re.MULTILINE):
            return folder
    raise FileNotFoundError(f"no rlhfscale project at or above {here}: run this inside its checkout")


def is_url(location: str) -> bool:
    """Whether a store's location is a URL, such as ``s3://bucket/prefix``, and not a folder."""
    return "://" in location


def store_location() -> str:
    """``$RLHFSCALE_STORE``, a folder or a URL; else ``.store`` in the project's root (in the current folder outside a
    project)."""
    if location := os.environ.get("RLHFSCALE_STORE"):
        return location
    try:
        return str(project_root() / ".store")
    except FileNotFoundError:
        return str(Path.cwd() / ".store")


def store_root(location: str | None = None) -> Path:
    """This machine's folder of the store at a location, by default at :func:`store_location`.

    That of a URL is its cache: ``$RLHFSCALE_CACHE``, or a folder for each URL below ``~/.cache/rlhfscale``.
    """
    location = store_location() if location is None else location
    if not is_url(location):
        return Path(location).absolute()
    if cache := os.environ.get("RLHFSCALE_CACHE"):
        return Path(cache).absolute()
    url = location.rstrip("/")
    name = re.sub(r"\W+", "-", url)[:60] + "-" + hashlib.sha256(url.encode()).hexdigest()[:8]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhfscale" / name


def results_root() -> Path:
    """``$RLHFSCALE_RESULTS``, or ``results`` in the project's root."""
    root = os.environ.get("RLHFSCALE_RESULTS")
    return Path(root).absolute() if root else project_root() / "results"


def current_tier() -> str:
    """``$RLHFSCALE_TIER``, or ``laptop``."""
    return os.environ.get("RLHFSCALE_TIER") or "laptop"
