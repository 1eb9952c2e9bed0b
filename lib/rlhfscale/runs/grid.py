"""The graph of specs: what is cached, what must run, and running it.

``plan(specs)`` says what would be done and how long it should take; ``ensure(specs)`` does it in a pool of worker
processes and returns the artifacts' folders. Specs may be given in ordered groups (the figures): nodes of earlier
groups go first, and within a group those with the longest chain of work behind them. The computation runs outside the
calling process, which may be a notebook's kernel, so its memory is given back and a crash leaves the kernel alive.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhfscale.runs.pool import LocalPool, Outcome, Pool
from rlhfscale.runs.progress import Progress
from rlhfscale.runs.spec import Spec
from rlhfscale.runs.store import Store, StoreError

MAX_ATTEMPTS = 2  # a node whose worker process died is tried once more
MAX_ATTEMPTS_ON_RAY = 4  # there machines come and go

Specs = Iterable[Spec] | Iterable[Iterable[Spec]] | Mapping[str, Iterable[Spec]]
"""Specs, or groups of specs in order of importance; a mapping gives the groups names."""


class GridError(Exception):
    """Some nodes failed; the message names each with its error and its log file."""


@dataclass
class Node:
    """One spec of a plan. ``status``: cached, todo, running, done, failed or skipped."""

    spec: Spec
    status: str
    group: int
    parents: tuple[str, ...] = ()
    path_s: float = 0.0
    """Estimated seconds from this node's start to the end of the longest chain of its group's nodes behind it."""
    attempts: int = 0
    started: float = 0.0
    """By the monotonic clock, where it is running."""


@dataclass
class Plan:
    """What :func:`ensure` would do, nodes in topological order. Shown as a table by rich and by notebooks."""

    nodes: dict[str, Node]
    groups: dict[str, tuple[Spec, ...]]
    """The requested specs by group; groups given without a name are called by their position."""
    workers: int = 2

    @property
    def to_run(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.status == "todo"]

    @property
    def cached(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.status == "cached"]

    @property
    def core_s(self) -> float:
        """Estimated seconds of one core for all nodes that must run."""
        return sum(node.spec.cost_s for node in self.to_run)

    @property
    def wall_s(self) -> float:
        """Estimated seconds until everything is done."""
        return max(self.finish_s().values(), default=0.0)

    def finish_s(self) -> dict[str, float]:
        """Estimated seconds from the start until each group is complete: the schedule, played through."""
        waiting = {node.spec.key: {p for p in node.parents if self.nodes[p].status == "todo"} for node in self.to_run}
        dependants: dict[str, list[str]] = {}
        for key, parents in waiting.items():
            for parent in parents:
                dependants.setdefault(parent, []).append(key)
        ready = sorted(_priority(self.nodes[key]) for key, parents in waiting.items() if not parents)
        running: list[tuple[float, str]] = []
        now, end = 0.0, {}
        while ready or running:
            while ready and len(running) < self.workers:
                key = heapq.heappop(ready)[-1]
                heapq.heappush(running, (now + self.nodes[key].spec.cost_s, key))
            now, finished = heapq.heappop(running)
            end[finished] = now
            for key in dependants.get(finished, ()):
                waiting[key].remove(finished)
                if not waiting[key]:
                    heapq.heappush(ready, _priority(self.nodes[key]))
        return {
            name: max((end.get(spec.key, 0.0) for spec in specs), default=0.0) for name, specs in self.groups.items()
        }

    def table(self) -> Table:
        """Nodes by stage: cached, to run, estimated core-minutes."""
        minutes, wall = self.core_s / 60, self.wall_s / 60
        caption = f"{minutes:.1f} core-minutes, about {wall:.1f} minutes with {self.workers} workers"
        table = Table("stage", caption=caption, min_width=len(caption) + 4)
        for name in ("cached", "to run", "core-minutes"):
            table.add_column(name, justify="right")
        for stage in dict.fromkeys(node.spec.stage for node in self.nodes.values()):
            nodes = [node for node in self.nodes.values() if node.spec.stage == stage]
            todo = [node for node in nodes if node.status == "todo"]
            cost = sum(node.spec.cost_s for node in todo) / 60
            table.add_row(stage, str(len(nodes) - len(todo)), str(len(todo)), f"{cost:.1f}")
        table.add_section()
        table.add_row("all", str(len(self.cached)), str(len(self.to_run)), f"{minutes:.1f}")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def _repr_mimebundle_(self, include: Any = (), exclude: Any = (), **kwargs: Any) -> dict[str, str]:
        return self.table()._repr_mimebundle_(include or (), exclude or (), **kwargs)


@dataclass(frozen=True)
class Failure:
    """A node that failed: its error in one line, the traceback, and the log with all that its stage printed."""

    spec: Spec
    message: str
    traceback: str
    log: Path

    @property
    def where(self) -> str:
        """The log's place: on a cluster with a store at a URL that is the machine that ran the node."""
        return str(self.log) if self.log.exists() else f"{self.log}, on the machine that ran it"


@dataclass
class Results(Mapping[Spec, Path]):
    """Maps each requested spec (and each of their ancestors that was looked at) to its artifact's folder.

    Iterates over the requested specs that have an artifact, in the order asked for. Asking for one that failed or was
    skipped raises KeyError with the reason.
    """

    store: Store
    requested: tuple[Spec, ...]
    status: dict[str, str]
    """Status of each node by key: cached, done, failed or skipped."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """By key."""

    def __getitem__(self, spec: Spec) -> Path:
        status = self.status.get(spec.key, "not part of this grid")
        if status not in ("cached", "done"):
            reason = f": {self.failures[spec.key].message}" if spec.key in self.failures else ""
            raise KeyError(f"{spec.title}: {status}{reason}")
        return self.store.open(spec.key)

    def __iter__(self):
        return (spec for spec in self.requested if self.status[spec.key] in ("cached", "done"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def plan(specs: Specs, store: Store | None = None, workers: int = 2) -> Plan:
    """What must run to have the artifacts of all ``specs``: nothing for a verified artifact, nor for its ancestors, nor
    for one that the store's URL lists."""
    store = store or Store()
    groups = _groups(specs)
    nodes: dict[str, Node] = {}

    def visit(spec: Spec, group: int) -> None:
        if spec.key in nodes:
            return
        if store.available(spec.key):
            nodes[spec.key] = Node(spec, "cached", group)
            return
        for parent in spec.parents:
            visit(parent, group)
        nodes[spec.key] = Node(spec, "todo", group, tuple(parent.key for parent in spec.parents))

    for index, members in enumerate(groups.values()):
        for spec in members:
            visit(spec, index)
    for node in reversed(nodes.values()):  # dependants before their parents
        node.path_s += node.spec.cost_s
        for parent in map(nodes.get, node.parents):
            if parent.group == node.group:
                parent.path_s = max(parent.path_s, node.path_s)
    return Plan(nodes, groups, workers)


def ensure(
    specs: Specs,
    *,
    store: Store | None = None,
    workers: int = 2,
    ray: str | None = None,
    progress: bool = True,
    on_done: Callable[[Spec, str], None] | None = None,
    raise_on_failure: bool = True,
    console: Console | None = None,
) -> Results:
    """Have the artifacts of all ``specs``, making what is missing in ``workers`` single-threaded processes, or as tasks
    of the Ray cluster at the address ``ray`` (``local`` starts one).

    ``on_done(spec, status)`` is called in this thread for every node as it is settled: cached, done, failed or skipped.
    A node that fails is reported, its dependants are skipped, all others go on; then GridError, unless
    ``raise_on_failure`` is false. A store that cannot be written stops everything with StoreError. Interrupted, it
    stops the workers, which delete what is half made, and raises KeyboardInterrupt; calling it again continues.
    Raises pool.PoolError, before anything is computed, where Ray cannot be used or this machine has too few GPUs. Of a
    store at a URL, the artifacts that ``specs`` asks for are downloaded first; one that is found damaged there is made
    again.
    """
    store, groups, console = store or Store(), _groups(specs), console or Console()
    requested = {spec.key: spec for group in groups.values() for spec in group}
    if away := store.elsewhere(requested):
        if progress:
            console.print(f"downloading {len(away)} artifacts from {store.location}", highlight=False, soft_wrap=True)
        store.fetch(away)
    todo = plan(groups, store, workers)
    results = Results(store, tuple(requested.values()), {})
    run = _Run(todo, store, results, console, on_done or (lambda spec, status: None), progress, ray)
    run.execute()
    if results.failures and raise_on_failure:
        lines = [f"{f.spec.title}: {f.message} (log: {f.where})" for f in results.failures.values()]
        skipped = sum(status == "skipped" for status in results.status.values())
        raise GridError(f"{len(lines)} failed, {skipped} skipped because of it:\n" + "\n".join(lines))
    return results


def status(store: Store | None = None) -> Table:
    """Artifacts by stage: how many, their size on disk, the time spent on them, the largest memory of one."""
    store = store or Store()
    count, size, wall, memory = Counter(), Counter(), Counter(), Counter()
    for manifest in store.artifacts():
        stage = manifest["spec"]["stage"]
        count[stage] += 1
        size[stage] += sum(file["bytes"] for file in manifest["files"].values())
        wall[stage] += manifest["wall_s"]
        memory[stage] = max(memory[stage], manifest["peak_memory_mib"])
    table = Table("stage")
    for name in ("artifacts", "MiB on disk", "minutes spent", "peak memory MiB"):
        table.add_column(name, justify="right")
    for stage in count:
        numbers = (f"{size[stage] / 2**20:.1f}", f"{wall[stage] / 60:.1f}", f"{memory[stage]:.0f}")
        table.add_row(stage, str(count[stage]), *numbers)
    table.add_section()
    table.add_row("all", str(count.total()), f"{size.total() / 2**20:.1f}", f"{wall.total() / 60:.1f}", "")
    return table


class _Run:
    """The state of one call of :func:`ensure`."""

    def __init__(self, todo: Plan, store: Store, results: Results, console: Console, on_done, progress: bool, ray):
        self.plan, self.nodes, self.store, self.results = todo, todo.nodes, store, results
        self.console, self.on_done, self.ray = console, on_done, ray
        self.progress = Progress(self, console) if progress else None
        self.pool: Pool | None = None
        self.estimated_s = self.spent_s = 0.0  # of nodes done: their ratio corrects the time left
        self.start = time.monotonic()

    def execute(self) -> None:
        self.store.share(node.spec.key for node in self.plan.cached)
        for node in self.plan.cached:
            self.settle(node, "cached")
        self.store.sweep()
        if not self.plan.to_run:
            return
        self.store.check_writable()
        self.pool = self.open_pool()
        try:
            self.pool.check([node.spec for node in self.plan.to_run])
            self.work()
        finally:
            self.stop()

    def work(self) -> None:
        if self.progress:
            self.progress.begin()
        try:
            while self.step():
                pass
        finally:
            if self.progress:
                self.progress.end()

    def open_pool(self) -> Pool:
        if self.ray is None:
            return LocalPool(self.store, self.plan.workers)
        from rlhfscale.runs.ray_pool import RayPool

        return RayPool(self.store, self.ray, self.plan.workers)

    def step(self) -> bool:
        """Start what there is room for and wait for something to end; False when nothing is left."""
        ready = sorted((node for node in self.plan.to_run if self.ready(node)), key=_priority)
        for node in ready:
            if not self.pool.room():
                break
            if not self.pool.takes(node.spec):
                continue
            node.status, node.attempts, node.started = "running", node.attempts + 1, time.monotonic()
            self.pool.start(node.spec)
        if not self.running:
            return False
        for outcome in self.pool.wait(0.5):
            self.receive(self.nodes[outcome.spec.key], outcome)
        if self.progress:
            self.progress.tick()
        return True

    @property
    def running(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.status == "running"]

    def ready(self, node: Node) -> bool:
        return all(self.nodes[parent].status in ("cached", "done") for parent in node.parents)

    def receive(self, node: Node, outcome: Outcome) -> None:
        log = self.store.root / "logs" / f"{node.spec.key}.log"
        if outcome.status == "lost":
            self.store.sweep()
            attempts = MAX_ATTEMPTS if self.ray is None else MAX_ATTEMPTS_ON_RAY
            if node.attempts < attempts:
                node.status = "todo"
                self.say(f"[yellow]retried[/] {escape(node.spec.title)}: {outcome.message}")
            else:
                self.fail(node, Failure(node.spec, f"{outcome.message}, {attempts} times", "", log))
            return
        if outcome.status == "store":
            raise StoreError(outcome.message)
        if outcome.status == "failed":
            self.fail(node, Failure(node.spec, outcome.message, outcome.traceback, log))
            return
        if outcome.status == "done":
            self.estimated_s += node.spec.cost_s
            self.spent_s += outcome.seconds
        with suppress(FileNotFoundError):  # another driver that asked for the same node may remove it first
            if log.stat().st_size == 0:
                log.unlink()
        self.settle(node, outcome.status)

    def fail(self, node: Node, failure: Failure) -> None:
        self.results.failures[node.spec.key] = failure
        self.say(f"[red]failed[/] {escape(node.spec.title)}: {escape(failure.message)}\n  log: {failure.where}")
        self.settle(node, "failed")
        lost = {node.spec.key}
        for other in self.nodes.values():  # topological order: one pass finds all dependants
            if other.status == "todo" and lost.intersection(other.parents):
                lost.add(other.spec.key)
                self.settle(other, "skipped")

    def settle(self, node: Node, outcome: str) -> None:
        node.status = outcome
        self.results.status[node.spec.key] = outcome
        self.on_done(node.spec, outcome)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """End the pool; what was half made is swept away, also by a worker whose driver was killed before."""
        at_work = self.running
        self.pool.stop()
        self.store.sweep()
        if at_work:
            done = sum(node.status in ("cached", "done") for node in self.nodes.values())
            self.say(f"stopped with {done} of {len(self.nodes)} nodes finished and kept: run again to continue")

    def left_s(self) -> float:
        """Estimated seconds left, from the specs' estimates corrected by the speed seen so far."""
        elapsed = {node.spec.key: time.monotonic() - node.started for node in self.running}
        nodes = [node for node in self.nodes.values() if node.status in ("todo", "running")]
        speed = self.spent_s / self.estimated_s if self.estimated_s else 1.0
        work = sum(max(0.0, node.spec.cost_s * speed - elapsed.get(node.spec.key, 0.0)) for node in nodes)
        chain = max((node.path_s * speed - elapsed.get(node.spec.key, 0.0) for node in nodes), default=0.0)
        return max(work / self.plan.workers, chain)


def _priority(node: Node) -> tuple:
    return node.group, -node.path_s, node.spec.key


def _groups(specs: Specs) -> dict[str, tuple[Spec, ...]]:
    """The specs as ordered, named groups, whichever way they were given."""
    if isinstance(specs, Mapping):
        return {name: tuple(members) for name, members in specs.items()}
    specs = list(specs)
    if all(isinstance(item, Spec) for item in specs):
        return {"all": tuple(specs)}
    return {str(index): tuple(members) for index, members in enumerate(specs)}
