"""A stage that several processes of one machine make together, one for each GPU that its spec needs.

They are started as ``torchrun`` starts processes, so in the stage's function `parallel.start` has joined them. All call
it with the same spec and inputs. What the first one writes becomes the artifact; the others write into folders that are
deleted. This module imports torch in those processes alone.
"""

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from rlhfscale.spec import Spec

ERROR = "error"


class TeamError(RuntimeError):
    """One of the processes that make a stage together failed; the message says which and how."""


def make(spec: Spec, inputs: dict[str, Path], folder: Path, size: int) -> None:
    """Call the stage's function in ``size`` processes, whose output goes where this one's goes.

    Raises:
        TeamError: one of them failed or was killed; the others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="rlhfscale-") as scratch:
        (Path(scratch) / "job").write_bytes(pickle.dumps((spec, inputs, folder)))
        command = [sys.executable, "-P", "-m", "rlhfscale.team", scratch, str(os.getpid())]
        shared = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
            )
            for rank in range(size)
        ]
        try:
            _wait(processes, Path(scratch))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _wait(processes: list[subprocess.Popen], scratch: Path) -> None:
    """Until all have ended well, or one has not: the others would wait for that one forever."""
    while True:
        running = [process.poll() is None for process in processes]
        for rank, process in enumerate(processes):
            if process.returncode:
                error = scratch / f"{ERROR}-{rank}"
                how = error.read_text() if error.exists() else f"ended with status {process.returncode}"
                raise TeamError(f"process {rank} of {len(processes)}: {how}")
        if not any(running):
            return
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def exit_with(parent: int) -> None:
    """End this process within a second of its parent's death, also in the middle of a long computation."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    scratch, parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=exit_with, args=(parent,), daemon=True).start()
    rank = int(os.environ["RANK"])
    try:
        from rlhfscale import parallel

        spec, inputs, folder = pickle.loads((scratch / "job").read_bytes())
        if rank:
            folder = scratch / f"folder-{rank}"
            folder.mkdir()
        parallel.start()
        module, _, name = spec.runner.partition(":")
        getattr(importlib.import_module(module), name)(spec, inputs, folder)
        parallel.barrier()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        (scratch / f"{ERROR}-{rank}").write_text(f"{type(error).__name__}: {text[0]}")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # torch would wait for the others first


if __name__ == "__main__":
    main()
