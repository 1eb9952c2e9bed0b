"""What a manifest says of code and machine: commit, package versions, processor."""

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("rlhfscale", "torch", "transformers", "peft", "trl", "numpy", "scipy", "pandas", "matplotlib")


def provenance() -> dict[str, Any]:
    """What a manifest says of code and machine: commit, package versions, processor."""
    return {
        **_git_state(),
        "packages": _versions(PACKAGES),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
    }


def _git_state() -> dict[str, Any]:
    """Commit and whether the tree differs from it, results aside; both None outside a git checkout."""

    def git(*arguments: str) -> str:
        source = Path(__file__).resolve().parent
        return subprocess.run(["git", *arguments], cwd=source, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)results")
        return {"git_commit": git("rev-parse", "HEAD").strip(), "git_dirty": bool(changed.strip())}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "git_dirty": None}


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
