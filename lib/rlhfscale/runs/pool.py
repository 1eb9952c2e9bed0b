"""Where the nodes of a grid are made: worker processes of this machine. `runs.ray_pool` is the other place.

A pool starts specs and says how they ended; which spec goes next, what is tried again and what is skipped is decided in
`runs.grid`.
"""

import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait

from rlhfscale.runs.spec import Spec
from rlhfscale.runs.store import Store

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TERMINATE_S = 3.0  # time for workers to delete their temporary folders before they are killed


@dataclass(frozen=True)
class Outcome:
    """How a spec's node ended.

    Attributes:
        status: ``done``, ``cached`` (another process has made it meanwhile), ``failed``, ``store`` (it cannot be
            written) or ``lost`` (the process or machine it ran on is gone).
        seconds: it took, 0 where nobody can tell.
        message: what went wrong, in one line.
    """

    spec: Spec
    status: str
    seconds: float = 0.0
    message: str = ""
    traceback: str = ""


class PoolError(RuntimeError):
    """Nodes cannot be made there; the message says why, and where they can."""


class Pool(ABC):
    """Where nodes are made."""

    @abstractmethod
    def check(self, specs: Iterable[Spec]) -> None:
        """Raise PoolError for specs that can never be made here, and warn of those that must wait, at the start."""

    @abstractmethod
    def room(self) -> int:
        """How many specs can be started now."""

    def takes(self, spec: Spec) -> bool:
        """Whether this one can be among them."""
        return True

    @abstractmethod
    def start(self, spec: Spec) -> None:
        """Begin to make a spec whose parents are made."""

    @abstractmethod
    def wait(self, timeout_s: float) -> Sequence[Outcome]:
        """What has ended, after at most that long."""

    @abstractmethod
    def stop(self) -> None:
        """End what runs, leaving no half-made artifact and no process."""


class LocalPool(Pool):
    """Single-threaded processes of `runs.worker`, each making one artifact after another."""

    def __init__(self, store: Store, workers: int):
        self.store, self.size = store, workers
        self.workers: list[_Worker] = []

    def check(self, specs: Iterable[Spec]) -> None:
        """More GPUs than the machine has are refused."""
        widest = max(specs, key=lambda spec: (spec.needs.machines, spec.needs.gpus))
        needs = widest.needs
        if not needs.gpus:
            return
        import torch  # takes a second, which most runs need not wait for

        found = torch.cuda.device_count()
        if needs.machines > 1 or found < needs.gpus:
            where = f"{needs.gpus} GPUs" + (f" of {needs.machines} machines" if needs.machines > 1 else "")
            raise PoolError(
                f"{widest.title}: takes {where}, this machine has {found}; run on a cluster by --ray ADDRESS, or make"
                " other figures by --figure"
            )

    def room(self) -> int:
        return self.size - sum(worker.spec is not None for worker in self.workers)

    def takes(self, spec: Spec) -> bool:
        """One that needs GPUs takes all of the machine's: nothing here shares them out."""
        return not (spec.needs.gpus and any(worker.spec and worker.spec.needs.gpus for worker in self.workers))

    def start(self, spec: Spec) -> None:
        idle = next((worker for worker in self.workers if worker.spec is None), None)
        if idle is None:
            idle = _Worker(self.store)
            self.workers.append(idle)
        idle.give(spec)

    def wait(self, timeout_s: float) -> list[Outcome]:
        busy = {worker.connection: worker for worker in self.workers if worker.spec}
        return [self._ended(busy[connection]) for connection in wait(list(busy), timeout=timeout_s)]

    def _ended(self, worker: "_Worker") -> Outcome:
        spec, worker.spec = worker.spec, None
        try:
            return Outcome(spec, *worker.connection.recv())
        except (EOFError, ConnectionError):
            self.workers.remove(worker)
            worker.connection.close()
            return Outcome(spec, "lost", message=f"its worker process {worker.death()}")

    def stop(self) -> None:
        """Those at work get a moment to delete what is half made, then they are killed."""
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.connection.close()
        self.workers.clear()


class _Worker:
    """A process of `runs.worker` and this end of the pipe to it."""

    def __init__(self, store: Store):
        self.connection, far_end = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlhfscale.runs.worker", str(far_end.fileno()), str(os.getpid())],
            pass_fds=[far_end.fileno()],
            env=os.environ | worker_environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal reaches the driver alone, which stops its workers
        )
        far_end.close()
        self.spec: Spec | None = None
        self.connection.send(store.location)

    def give(self, spec: Spec) -> None:
        self.spec = spec
        with suppress(OSError):  # it may have died just now: its closed pipe will tell
            self.connection.send(spec)

    def death(self) -> str:
        """Why the process has ended, in words."""
        code = self.process.wait()
        if code == -9:
            return "was killed (signal 9; often the machine ran out of memory)"
        return f"was ended by signal {-code}" if code < 0 else f"exited with status {code}"


def worker_environment() -> dict[str, str]:
    """What a process that makes artifacts needs: one thread for every numerical library, and this one's modules."""
    return dict.fromkeys(THREAD_VARIABLES, "1") | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
