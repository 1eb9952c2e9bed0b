"""How many GPUs a stage is given: the fewest that hold it, by the planner's own account."""

from functools import lru_cache
from math import ceil

from rlhfscale.planning.costs import MOST_GPUS, Options, fitted
from rlhfscale.planning.hardware import DEFAULT, HARDWARE, hardware, kind_for
from rlhfscale.planning.workloads import Workload, workload
from rlhfscale.runs.pool import PoolError
from rlhfscale.runs.spec import Spec


def placed(spec: Spec) -> tuple[int, int]:
    """GPUs that a stage takes, and machines that they are in.

    Raises:
        ValueError: unknown hardware.
        PoolError: no number of such GPUs holds the stage; the message says what would.
    """
    work, kind = workload(spec), kind_for() or DEFAULT
    gpus = _fewest(work, kind)
    if gpus is None:
        others = [other for other in HARDWARE if _fewest(work, other)]
        fits = f"it fits on --gpu {' or '.join(others)}" if others else "nor of any other GPU that is known"
        raise PoolError(f"{spec.title}: no number of {kind} holds it; {fits}")
    return gpus, max(1, ceil(gpus / hardware(kind).gpus_per_node))


@lru_cache
def _fewest(work: Workload, kind: str) -> int | None:
    if not work.phases:  # weights are copied
        return 0
    found = fitted(work, Options(hardware(kind), MOST_GPUS))
    return found and found[0]
