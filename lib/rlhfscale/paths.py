"""Where things are: the project's root, the artifact store and the results, for notebooks and the command line alike.

The command line sets ``RLHFSCALE_STORE``, ``RLHFSCALE_RESULTS`` and ``RLHFSCALE_TIER`` for the notebooks it runs, so
that their library calls agree with its options; a reader in JupyterLab has none of them and gets the defaults.
"""

import os
import re
from pathlib import Path


def project_root() -> Path:
    """The nearest folder at or above the current one whose pyproject.toml names rlhfscale, else the source checkout.

    Raises FileNotFoundError where neither is such a folder (a package installed without its checkout).
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        project = folder / "pyproject.toml"
        if project.is_file() and re.search(r'^name\s*=\s*"rlhfscale"', project.read_text(), re.MULTILINE):
            return folder
    raise FileNotFoundError(f"no rlhfscale project at or above {here}: run this inside its checkout")


def store_root() -> Path:
    """``$RLHFSCALE_STORE``, or ``.store`` in the project's root (in the current folder outside a project)."""
    if root := os.environ.get("RLHFSCALE_STORE"):
        return Path(root).absolute()
    try:
        return project_root() / ".store"
    except FileNotFoundError:
        return Path.cwd() / ".store"


def results_root() -> Path:
    """``$RLHFSCALE_RESULTS``, or ``results`` in the project's root."""
    root = os.environ.get("RLHFSCALE_RESULTS")
    return Path(root).absolute() if root else project_root() / "results"


def current_tier() -> str:
    """``$RLHFSCALE_TIER``, or ``laptop``."""
    return os.environ.get("RLHFSCALE_TIER") or "laptop"
