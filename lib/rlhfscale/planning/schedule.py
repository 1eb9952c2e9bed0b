"""The graph of stages played through on a number of GPUs.

List scheduling (Graham 1969): whenever GPUs are free, the first stage in order that is ready and fits is started. The
order is the grid's own: earlier figures first, and within a figure those with the longest chain of work behind them.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A stage to be scheduled.

    Attributes:
        seconds: it takes.
        gpus: it takes; 0 for one that is made beside the others.
        parents: keys of tasks that must be done before.
        group: earlier groups go first.
    """

    seconds: float
    gpus: int
    parents: tuple[str, ...] = ()
    group: int = 0


@dataclass(frozen=True)
class Simulation:
    """How a graph went.

    Attributes:
        gpus: there were.
        makespan_s: from the start until all is done.
        critical_path_s: the longest chain of tasks: no number of GPUs is faster.
        work_s: GPU-seconds of all tasks over the number of GPUs: no schedule is faster.
        idle: share of the GPUs' time that nobody used.
        bound: what the makespan follows: ``critical path`` or ``total work``, whichever is longer; ``widest stage``
            where it is far above both, since GPUs stand idle that are too few for the next stage.
        busiest: most GPUs in use at a time.
    """

    gpus: int
    makespan_s: float
    critical_path_s: float
    work_s: float
    idle: float
    bound: str
    busiest: int


NEAR = 1.1
"""A makespan follows what it is at most so many times as long as."""


def simulate(tasks: Mapping[str, Task], gpus: int) -> Simulation:
    """Play the graph through.

    Raises ValueError for a task that is wider than the cluster, or a parent that is no task.
    """
    for key, task in tasks.items():
        if task.gpus > gpus:
            raise ValueError(f"{key} takes {task.gpus} GPUs, there are {gpus}")
        if missing := [parent for parent in task.parents if parent not in tasks]:
            raise ValueError(f"{key} needs {', '.join(missing)}, which is no task")
    behind = _paths(tasks)
    order = {key: (task.group, -behind[key], key) for key, task in tasks.items()}
    waiting = {key: set(task.parents) for key, task in tasks.items()}
    dependants = _dependants(tasks)
    ready = sorted((key for key, parents in waiting.items() if not parents), key=order.get)
    running: list[tuple[float, str]] = []
    now, free, busiest = 0.0, gpus, 0
    while ready or running:
        for key in list(ready):
            if tasks[key].gpus <= free:
                ready.remove(key)
                free -= tasks[key].gpus
                heapq.heappush(running, (now + tasks[key].seconds, key))
        busiest = max(busiest, gpus - free)
        now, done = heapq.heappop(running)
        free += tasks[done].gpus
        for key in dependants[done]:
            waiting[key].discard(done)
            if not waiting[key]:
                ready.append(key)
        ready.sort(key=order.get)
    work, path = sum(task.seconds * task.gpus for task in tasks.values()), critical_path_s(tasks)
    widest = max((task.gpus for task in tasks.values()), default=0)
    used = work / (gpus * now) if now else 1.0
    return Simulation(gpus, now, path, work / gpus, 1.0 - used, _bound(now, path, work / gpus, widest), busiest)


def _bound(makespan: float, path: float, work: float, widest: int) -> str:
    if widest > 1 and makespan > NEAR * max(path, work):
        return "widest stage"
    return "critical path" if path >= work else "total work"


def _dependants(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {key: [] for key in tasks}
    for key, task in tasks.items():
        for parent in task.parents:
            found[parent].append(key)
    return found


def _paths(tasks: Mapping[str, Task]) -> dict[str, float]:
    """Seconds from a task's start to the end of the longest chain of its group's tasks behind it, as `grid.plan`."""
    found: dict[str, float] = {}
    dependants = _dependants(tasks)
    for key in reversed(_topological(tasks)):
        own = [found[other] for other in dependants[key] if tasks[other].group == tasks[key].group]
        found[key] = tasks[key].seconds + max(own, default=0.0)
    return found


def critical_path_s(tasks: Mapping[str, Task]) -> float:
    """Seconds that any number of GPUs takes."""
    found: dict[str, float] = {}
    for key in _topological(tasks):
        found[key] = tasks[key].seconds + max((found[parent] for parent in tasks[key].parents), default=0.0)
    return max(found.values(), default=0.0)


def _topological(tasks: Mapping[str, Task]) -> list[str]:
    """Parents first. Raises ValueError for a circle."""
    order: list[str] = []
    left = {key: set(task.parents) for key, task in tasks.items()}
    dependants = _dependants(tasks)
    ready = [key for key, parents in left.items() if not parents]
    while ready:
        key = ready.pop()
        order.append(key)
        for other in dependants[key]:
            left[other].discard(key)
            if not left[other]:
                ready.append(other)
    if len(order) < len(tasks):
        raise ValueError("the tasks' parents go in a circle")
    return order
