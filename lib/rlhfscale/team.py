"""A stage that several processes of one machine make together, one for each GPU that its spec needs.

They are started as ``torchrun`` starts processes, and `parallel.start` has joined them when the stage's function is
called: by all, with the same spec and inputs. What the first one writes becomes the artifact; the others write into
folders that are deleted. This module imports torch in those processes alone.
"""

import importlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from rlhfscale.spec import Spec

BLAME_S = 2.0
"""Seconds for which others' failures are waited for after the first: whose it was shows in when they failed."""


class TeamError(RuntimeError):
    """One of the processes that make a stage together failed; the message says which and how."""


def make(spec: Spec, inputs: dict[str, Path], folder: Path, size: int) -> None:
    """Call the stage's function in ``size`` processes, whose output goes where this one's goes.

    Raises:
        TeamError: one of them failed or was killed; the others are ended.
    """
    processes: dict[Connection, subprocess.Popen] = {}
    with tempfile.TemporaryDirectory(prefix="rlhfscale-") as scratch:
        try:
            port = _free_port()
            for rank in range(size):
                own = folder if rank == 0 else Path(scratch, str(rank))
                own.mkdir(exist_ok=True)
                connection, process = _start(rank, size, port)
                processes[connection] = process
                connection.send((spec, inputs, own))
            _wait(processes)
        finally:
            for connection, process in processes.items():
                process.kill()
                process.wait()
                connection.close()


def _start(rank: int, size: int, port: int) -> tuple[Connection, subprocess.Popen]:
    """One of the processes, and this end of the pipe to it."""
    connection, far_end = Pipe()
    about = {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlhfscale.team", str(far_end.fileno()), str(os.getpid())],
        pass_fds=[far_end.fileno()],
        env=os.environ | about,
        stdin=subprocess.DEVNULL,
    )
    far_end.close()
    return connection, process


def _wait(processes: dict[Connection, subprocess.Popen]) -> None:
    """Until all have ended well, or one has not: the others would wait for that one forever."""
    left, failed = set(processes), []
    while left:
        ended = wait(left, timeout=BLAME_S if failed else None)
        if failed and not ended:
            break
        for connection in ended:
            left.remove(connection)
            when, error = _result(connection, processes[connection])
            if error:
                failed.append((when, f"process {list(processes).index(connection)} of {len(processes)}: {error}"))
    if failed:
        raise TeamError(min(failed)[1])


def _result(connection: Connection, process: subprocess.Popen) -> tuple[float, str]:
    """When a process ended, and what went wrong, if anything. One that was killed cannot say, and counts as first."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        return 0.0, f"ended with status {process.wait()}"


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
    connection, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=exit_with, args=(parent,), daemon=True).start()
    error = ""
    try:
        from rlhfscale import parallel

        spec, inputs, folder = connection.recv()
        parallel.start()
        module, _, name = spec.runner.partition(":")
        getattr(importlib.import_module(module), name)(spec, inputs, folder)
        parallel.barrier()
    except Exception as problem:
        text = str(problem).strip().splitlines() or [""]
        error = f"{type(problem).__name__}: {text[0]}"
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send((time.time(), error))
    os._exit(bool(error))  # at its usual end, torch would wait for processes that have failed


if __name__ == "__main__":
    main()
