"""A stage that processes on several machines of a Ray cluster make together.

The task that makes the stage has a placement group with a share of the GPUs on each machine. It starts the processes of
its own machine (see `team`) and one task on each other machine that starts the processes there, and it ends all of them
when one fails or a machine is gone. Ray ends those tasks where this one's machine is lost.
"""

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhfscale.runs import team, worker
from rlhfscale.runs.spec import Needs, Spec
from rlhfscale.runs.store import Store, StoreError

TIDY_S = 10.0
"""For which tasks on other machines may delete what they have written, before they are killed."""


def resources(needs: Needs) -> dict[str, Any]:
    """What a task takes of one machine."""
    return {
        "num_cpus": needs.cpus,
        "num_gpus": needs.gpus / needs.machines,
        "memory": needs.memory_mib * 2**20,
    }


def set_aside(needs: Needs) -> Any:
    """A placement group with these resources on each machine."""
    import ray

    asked = resources(needs)
    each = {"CPU": asked["num_cpus"], "GPU": asked["num_gpus"], "memory": asked["memory"]}
    return ray.util.placement_group([{name: amount for name, amount in each.items() if amount}] * needs.machines)


def on(group: Any, machine: int, needs: Needs) -> dict[str, Any]:
    """Options of the task on one of a group's machines."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return resources(needs) | {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, machine)}


def make(spec: Spec, inputs: Mapping[str, Path], folder: Path, needs: Needs, location: str) -> None:
    """Have the stage made; called by the task on the placement group's first machine.

    Raises:
        team.TeamError: a process failed, on this machine or another.
        team.MachineLost: another machine is gone.
    """
    import ray

    _let_gloo_find_others()
    per_machine = needs.gpus // needs.machines
    here = team.Place(needs.gpus, per_machine, 0, ray.util.get_node_ip_address(), team.free_port())
    join = ray.remote(max_retries=0)(_join)
    group = ray.util.get_current_placement_group()
    others = [
        join.options(**on(group, index, needs)).remote(spec, location, replace(here, first=index * per_machine))
        for index in range(1, needs.machines)
    ]
    try:
        team.make(spec, inputs, folder, here, partial(_failures, others))
        ray.wait(others, num_returns=len(others), timeout=team.LOST_S)
    except BaseException:
        for task in others:
            ray.cancel(task)
        ray.wait(others, num_returns=len(others), timeout=TIDY_S)
        raise
    finally:
        for task in others:
            ray.cancel(task, force=True)


def _join(spec: Spec, location: str, place: team.Place) -> None:
    """Start this machine's processes of a stage and wait for them; what they print goes to a log beside the first
    machine's."""
    _let_gloo_find_others()
    store = Store(location)
    log = store.root / "logs" / f"{spec.key}.{place.first}.log"
    with store.writing():
        worker.print_to(log)
    inputs = {parent.key: store.open(parent.key) for parent in spec.parents}
    team.make(spec, inputs, None, place)
    if log.stat().st_size == 0:
        log.unlink()


def _let_gloo_find_others() -> None:
    """Name the network that Ray uses to gloo, which would take the one that the machine's own name stands for."""
    import ray

    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface with an IPv4 address; None where there is none, or no Linux to ask."""
    get_address = 0x8915  # SIOCGIFADDR, see netdevice(7)
    for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()))
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def _failures(tasks: Sequence[Any], timeout_s: float) -> list[team.TeamError]:
    """What has gone wrong on other machines, after at most so many seconds. Raises StoreError for a store that they
    cannot read."""
    import ray

    failed = []
    ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_s)
    for task in ended:
        try:
            ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StoreError):
                raise error.cause from None
            known = isinstance(error.cause, team.TeamError)
            failed.append(error.cause if known else team.TeamError(f"on another machine: {error.cause}", time.time()))
        except ray.exceptions.RayError as error:
            failed.append(team.MachineLost(f"another machine of its team is gone ({type(error).__name__})"))
    return failed
