"""Training on several processes at once, each with a copy of the model (data parallelism) or a share of it (see
`sharding`).

Where ``torch.distributed`` is set up (``torchrun`` does it, see `start`), each process computes its share of every
batch's sequences, in sampling, scoring and training. What they find for each token (log-probabilities, values, scores)
is summed over processes, so every process has the numbers of the whole batch and computes the same advantages and
losses from them; only its own share carries gradients, and these are summed before each optimiser step. So the losses
know nothing of this module, and the copies stay equal. One process alone does none of it.

What is sent is a few numbers a token and the gradients of what is trained: with LoRA, of the adapters.
"""

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=6)
"""For which processes wait for one that loads, merges or writes a large model, or asks a sampler that all share."""
CHUNK = 2**28
"""Bytes sent at a time."""


def start(backend: str | None = None) -> None:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started: gloo on CPUs, NCCL on GPUs, where each
    process takes the GPU of its number on its machine. Nothing happens outside of them."""
    if "RANK" in os.environ and not dist.is_initialized():
        device = None
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        backend = backend or ("gloo" if device is None else "nccl")
        # named, so that NCCL does not have to guess which GPU a process has
        dist.init_process_group(backend, timeout=PATIENCE, device_id=device if backend == "nccl" else None)


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; files are written by 0 alone."""
    return dist.get_rank() if size() > 1 else 0


def barrier() -> None:
    """Wait until all processes are here, without work for a GPU meanwhile."""
    if size() > 1:
        dist.barrier(_waiting())


@cache
def _waiting() -> dist.ProcessGroup:
    return dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)


def of_first(content: bytes) -> bytes | bytearray:
    """The first process's bytes, in every process; the others' are not looked at."""
    if size() == 1:
        return content
    group = _waiting()
    count = torch.tensor(len(content))
    dist.broadcast(count, 0, group)
    buffer = bytearray(content if rank() == 0 else int(count))
    for start in range(0, len(buffer), CHUNK):
        size_here = min(CHUNK, len(buffer) - start)
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8, count=size_here, offset=start), 0, group)
    return buffer


@cache
def machine() -> dist.ProcessGroup:
    """The processes of this machine. All processes must ask, and each machine must run as many.

    Raises:
        ValueError: they cannot: the number of all is no multiple of this machine's.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    if size() % here:
        raise ValueError(f"LOCAL_WORLD_SIZE: {here} processes here, {size()} in all; start as many on each machine")
    return dist.group.WORLD if here == size() else dist.new_subgroups(here, timeout=PATIENCE)[0]


def most(count: int, device: torch.device) -> int:
    """The largest of the processes' counts."""
    if size() == 1:
        return count
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def in_turn() -> Iterator[None]:
    """Yields once, when it is this process's turn on its machine; the next one's turn comes after the loop's body."""
    group = machine() if size() > 1 else None
    for turn in range(dist.get_world_size(group) if group else 1):
        if group is None or turn == dist.get_rank(group):
            yield
        barrier()


def own(count: int) -> torch.Tensor:
    """int64: which of ``count`` sequences are this process's. Never none, or its loss would have no gradient; what
    several processes compute, because there are fewer sequences than processes, counts once (see `whole`)."""
    return torch.arange(min(rank(), count - 1), count, size())


def leads_machine() -> bool:
    """Whether this is the first process of its machine. All processes must ask, see `machine`."""
    return size() == 1 or dist.get_rank(machine()) == 0


def of_machine(count: int) -> torch.Tensor:
    """int64: which of ``count`` sequences are this process's, where the first one of each machine has the share of all
    that are there; none for the others."""
    here = dist.get_world_size(machine()) if size() > 1 else 1
    first = rank() // here if leads_machine() else count
    return torch.arange(min(first, count), count, size() // here)


def whole(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The values of all sequences, [count, ...], from each process's ``values`` of its ``rows`` (see `own`).

    Those of this process keep their gradient.
    """
    if size() == 1:
        return values
    return gathered(values if rank() < count else 0 * values, rows, count)


def gathered(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """As `whole`, of ``rows`` that no two processes share."""
    return summed(values.new_zeros(count, *values.shape[1:]).index_copy(0, rows.to(values.device), values))


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over processes, of which this process's term keeps its gradient."""
    if size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return values + (total - values.detach()) if values.requires_grad else total


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum gradients over processes, in place; a parameter without one counts as 0 where another process has one."""
    if size() == 1:
        return
    parameters = list(parameters)
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.float32)
    has = has.to(parameters[0].device)
    dist.all_reduce(has)
    moved = [parameter for parameter, some in zip(parameters, has.tolist(), strict=True) if some]
    for parameter in moved:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if moved:
        flat = torch.cat([parameter.grad.flatten() for parameter in moved])
        dist.all_reduce(flat)
        for parameter, part in zip(moved, flat.split([p.numel() for p in moved]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
