"""Starts a script on this machine as ``torchrun`` would, for the tests of training on several processes."""

import os
import subprocess
import sys
from pathlib import Path

from rlhfscale.runs import team


def run(script: Path, *arguments: object, size: int, per_machine: int | None = None) -> None:
    """Run ``script`` in ``size`` processes that find each other, as on machines of ``per_machine``; one process alone
    without the environment of ``torchrun``."""
    about = {"LOCAL_WORLD_SIZE": str(per_machine or size)} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(team.free_port()),
        "WORLD_SIZE": str(size),
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=environment | (about | {"RANK": str(rank)} if size > 1 else {}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
