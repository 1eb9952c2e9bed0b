"""The nodes of a grid as Ray tasks, on a cluster or on a Ray of this machine's own.

The store must be a folder that every machine of the cluster sees under the same path, or a URL that each can read and
write with credentials of its own. Locks, checksums and renames are the store's own, so a task whose machine is lost
leaves nothing behind but a temporary folder, which `Store.sweep` deletes. Ray is asked for cores, GPUs and memory by
each spec and decides what runs where; a stage that takes several machines is `ray_team`'s. Ray never repeats a task by
itself: the grid counts attempts.
"""

import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhfscale.runs import ray_team, team
from rlhfscale.runs.paths import GPU_VARIABLE
from rlhfscale.runs.pool import THREAD_VARIABLES, Outcome, Pool, PoolError, worker_environment
from rlhfscale.runs.spec import Needs, Spec
from rlhfscale.runs.store import Store, StoreError

LOCAL = "local"

T, R = TypeVar("T"), TypeVar("R")


class RayError(PoolError):
    """Ray is not installed, or no cluster answers at the address."""


class RayPool(Pool):
    """Ray tasks.

    Args:
        store: on a file system that all machines share, or at a URL.
        address: of a running cluster, such as ``10.0.0.1:6379`` or ``ray://host:10001``; ``local`` starts one here.
        workers: cores of the cluster that ``local`` starts; ignored for another.

    Raises:
        RayError: see there.
    """

    def __init__(self, store: Store, address: str, workers: int):
        try:
            import ray
        except ImportError as error:
            raise RayError("--ray needs Ray, which is not installed: make setup EXTRAS=ray") from error
        self.ray, self.store = ray, store
        self.mine = not ray.is_initialized()
        if self.mine:
            _check_answers(address)
            where, variables = {"address": address}, dict.fromkeys(THREAD_VARIABLES, "1")
            if address == LOCAL:
                where, variables = {"num_cpus": workers, "include_dashboard": False}, worker_environment()
            if GPU_VARIABLE in os.environ:
                variables |= {GPU_VARIABLE: os.environ[GPU_VARIABLE]}
            try:
                ray.init(**where, runtime_env={"env_vars": variables}, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RayError(f"--ray {address}: no Ray cluster could be reached there ({error})") from error
        self.make = ray.remote(max_retries=0)(_make)
        self.running: dict[Any, Spec] = {}
        self.groups: dict[Any, Any] = {}  # of tasks that take several machines
        self._check_store()

    def check(self, specs: Iterable[Spec]) -> None:
        """Warn of specs that take more machines with so many GPUs than there are: they wait for others to join."""
        alive = [int(node["Resources"].get("GPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        waiting: dict[tuple[int, int, int], str] = {}
        for spec in specs:
            machines, each = spec.needs.machines, spec.needs.gpus // spec.needs.machines
            there = sum(gpus >= each for gpus in alive)
            if each and there < machines:
                waiting.setdefault((machines, each, there), spec.title)
        for (machines, each, there), title in waiting.items():
            warnings.warn(
                f"{title}: takes {machines} x {each} GPUs, and {there} machines of the cluster have {each}: it waits",
                stacklevel=2,
            )

    def room(self) -> int:
        """One waiting task behind each that runs, so that no core waits for the driver; not more, so that the order of
        the plan holds."""
        return max(0, 2 * int(self.ray.cluster_resources().get("CPU", 1)) - len(self.running))

    def start(self, spec: Spec) -> None:
        needs = spec.needs
        group = ray_team.set_aside(needs) if needs.machines > 1 else None
        options = ray_team.on(group, 0, needs) if group else ray_team.resources(needs)
        task = self.make.options(name=spec.title, **options).remote(spec, self.store.location, needs)
        self.running[task] = spec
        if group:
            self.groups[task] = group

    def wait(self, timeout_s: float) -> list[Outcome]:
        done, _ = self.ray.wait(list(self.running), timeout=timeout_s)
        return [self._ended(task, self.running.pop(task)) for task in done]

    def _ended(self, task: Any, spec: Spec) -> Outcome:
        self._release(task)
        lost = self.ray.exceptions
        try:
            return Outcome(spec, *self.ray.get(task))
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError, lost.ObjectLostError) as error:
            return Outcome(spec, "lost", message=f"its Ray worker is gone ({type(error).__name__})")

    def stop(self) -> None:
        for task in self.running:
            self.ray.cancel(task, force=True)
            self._release(task)
        self.running.clear()
        if self.mine:
            self.ray.shutdown()

    def _release(self, task: Any) -> None:
        """Give back the machines that were set aside for a task."""
        if group := self.groups.pop(task, None):
            self.ray.util.remove_placement_group(group)

    def _check_store(self) -> None:
        """Raise RayError unless every machine of the cluster can use the store."""
        if self.store.remote:
            for name, refusal in self._ask_all(_cannot_write, self.store.location):
                if refusal:
                    raise RayError(f"--ray: {name}: {refusal}")
            return
        probe = self.store.root / f".probe.{os.getpid()}.{threading.get_ident()}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        try:
            blind = [name for name, found in self._ask_all(_sees, probe) if not found]
        finally:
            probe.unlink()
        if blind:
            raise RayError(
                f"--ray: {', '.join(blind)} cannot see the store {self.store.root}; choose a folder that all machines"
                " share, or a URL (--store, RLHFSCALE_STORE)"
            )

    def _ask_all(self, question: Callable[[T], R], about: T) -> list[tuple[str, R]]:
        """Each machine's name and answer; machines that only schedule are not asked."""
        ask = self.ray.remote(num_cpus=0, max_retries=0)(question)
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        alive = [node for node in self.ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        asked = [ask.options(scheduling_strategy=strategy(node["NodeID"], soft=True)).remote(about) for node in alive]
        names = [node["NodeManagerHostname"] for node in alive]
        return list(zip(names, self.ray.get(asked), strict=True))


def _check_answers(address: str) -> None:
    """Raise RayError where nothing listens: Ray itself tries for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == LOCAL:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise RayError(f"--ray {address}: no Ray cluster answers there ({error}); give host:port or local") from None


def _sees(probe: Path) -> bool:
    return probe.exists()


def _cannot_write(location: str) -> str:
    """Why this machine cannot use the store, or an empty string."""
    try:
        Store(location).check_writable()
    except StoreError as error:
        return str(error)
    return ""


def _make(spec: Spec, location: str, needs: Needs) -> tuple[str, float, str, str]:
    from rlhfscale.runs import worker

    several = partial(ray_team.make, needs=needs, location=location) if needs.machines > 1 else team.of(needs)
    return worker.attempt(spec, Store(location), several)
