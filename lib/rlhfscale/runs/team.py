"""A stage that several processes make together, one for each GPU that its spec needs.

They are started as ``torchrun`` starts processes, and `parallel.start` has joined them when the stage's function is
called: by all, with the same spec and inputs. What the first one writes becomes the artifact; the others write into
folders that are deleted. This module starts those of one machine, which may be all or not (see `ray_team`), and imports
torch in those processes alone.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from rlhfscale.runs.spec import Needs, Spec

LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_")
"""What the variables of others that start teams begin with."""
BLAME_S, LOST_S = 2.0, 90.0
"""Seconds for which others' failures are waited for after the first: whose it was shows in when they failed. On other
machines longer: until it is known that one is gone."""


class TeamError(RuntimeError):
    """One of the processes that make a stage together failed; the message says which and how.

    Args:
        when: seconds since the epoch; 0 for one that was killed, which counts as the first.
    """

    def __init__(self, message: str, when: float = 0.0):
        super().__init__(message, when)

    def __str__(self) -> str:
        return self.args[0]

    @property
    def when(self) -> float:
        return self.args[1]


class MachineLost(TeamError):
    """A machine is gone, with the processes that it had of a team: nothing is wrong with the stage."""


@dataclass(frozen=True)
class Place:
    """Which processes of a team are on this machine, and where all of them meet.

    Attributes:
        size: processes in all.
        here: of them on this machine.
        first: number of the first one here.
        address, port: where process 0 listens.
    """

    size: int
    here: int
    first: int
    address: str
    port: int


Elsewhere = Callable[[float], Sequence[TeamError]]
"""What has failed on other machines; waits for so many seconds until those have ended."""


def of(needs: Needs) -> Callable[..., None] | None:
    """What makes a stage with the processes that it needs on this machine; None where one process makes it."""
    return partial(make_here, size=needs.gpus) if needs.gpus > 1 else None


def make_here(spec: Spec, inputs: Mapping[str, Path], folder: Path, size: int) -> None:
    """Call the stage's function in ``size`` processes of this machine; see `make`."""
    make(spec, inputs, folder, Place(size, size, 0, "127.0.0.1", free_port()))


def make(
    spec: Spec,
    inputs: Mapping[str, Path],
    folder: Path | None,
    place: Place,
    elsewhere: Elsewhere = lambda timeout_s: (),
) -> None:
    """Call the stage's function in the processes of this machine, whose output goes where this one's goes.

    Args:
        folder: becomes the artifact; of the machine with process 0 only.

    Raises:
        TeamError: one of them, or elsewhere, failed or was killed; those here are ended.
    """
    processes: dict[Connection, subprocess.Popen] = {}
    with tempfile.TemporaryDirectory(prefix="rlhfscale-") as scratch:
        try:
            for rank in range(place.first, place.first + place.here):
                # the others' are laid out as a store is, so that each has checkpoints of its own
                own = folder if rank == 0 else Path(scratch, str(rank), "tmp", f"{spec.key}.{rank}")
                own.mkdir(parents=True, exist_ok=True)
                connection, process = _start(rank, place)
                processes[connection] = process
                connection.send((spec, inputs, own))
            _wait(processes, place, elsewhere)
        finally:
            for connection, process in processes.items():
                process.kill()
                process.wait()
                connection.close()


def _start(rank: int, place: Place) -> tuple[Connection, subprocess.Popen]:
    """One of the processes, and this end of the pipe to it."""
    connection, far_end = Pipe()
    about = {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "WORLD_SIZE": str(place.size),
        "LOCAL_WORLD_SIZE": str(place.here),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank - place.first),
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "rlhfscale.runs.team", str(far_end.fileno()), str(os.getpid())],
        pass_fds=[far_end.fileno()],
        env={name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)} | about,
        stdin=subprocess.DEVNULL,
    )
    far_end.close()
    return connection, process


def _wait(processes: Mapping[Connection, subprocess.Popen], place: Place, elsewhere: Elsewhere) -> None:
    """Until all have ended well, or one has not: the others would wait for that one forever."""
    ranks = dict(zip(processes, range(place.first, place.size), strict=False))
    left, failed = set(processes), []
    while left:
        ended = wait(left, timeout=BLAME_S)
        for connection in ended:
            left.remove(connection)
            when, error = _result(connection, processes[connection])
            if error:
                failed.append(TeamError(f"process {ranks[connection]} of {place.size}: {error}", when))
        failed += elsewhere(0.0)
        if failed and not ended:
            break
    if failed:
        raise min((*failed, *elsewhere(LOST_S)), key=lambda error: (not isinstance(error, MachineLost), error.when))


def _result(connection: Connection, process: subprocess.Popen) -> tuple[float, str]:
    """When a process ended, and what went wrong, if anything. Of those that cannot say, one that was killed counts as
    the first, and others have ended now."""
    try:
        return connection.recv()
    except (EOFError, ConnectionError):
        status = process.wait()
        return 0.0 if status == -signal.SIGKILL else time.time(), f"ended with status {status}"


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
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
        from rlhfscale.models import parallel

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
