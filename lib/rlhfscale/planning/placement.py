"""How many GPUs a stage is given: the fewest that hold it, by the planner's own account."""

import os
from functools import lru_cache
from math import ceil

from rlhfscale.planning.costs import MOST_GPUS, Options, fitted, refusal
from rlhfscale.planning.hardware import DEFAULT, VARIABLE, hardware
from rlhfscale.planning.workloads import Workload, workload
from rlhfscale.pool import PoolError
from rlhfscale.spec import Spec


def placed(spec: Spec) -> tuple[int, int]:
    """GPUs that a stage takes, and machines that they are in.

    Raises:
        ValueError: unknown hardware.
        PoolError: no number of such GPUs holds the stage; the message says what would.
    """
    work, kind = workload(spec), os.environ.get(VARIABLE) or DEFAULT
    gpus = _fewest(work, kind)
    if gpus is None:
        raise PoolError(refusal(spec, work, _options(kind)))
    return gpus, max(1, ceil(gpus / hardware(kind).gpus_per_node))


@lru_cache
def _fewest(work: Workload, kind: str) -> int | None:
    if not work.phases:  # weights are copied
        return 0
    found = fitted(work, _options(kind))
    return found and found[0]


def _options(kind: str) -> Options:
    return Options(hardware(kind), MOST_GPUS)
