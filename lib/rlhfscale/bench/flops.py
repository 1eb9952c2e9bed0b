"""Arithmetic speed: what the machine's matrix product reaches, and what share of it a step does."""

import time

import torch

SIZES = (512, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.bfloat16}


def matmul_peak(dtype: str, threads: int, *, repeats: int = 8) -> float:
    """FLOP/s of the fastest of several square matrix products on this machine.

    Args:
        dtype: fp32, bf16, or nf4, which computes in bf16.
        threads: to compute with; the process's number is put back afterwards.
        repeats: products timed for each size, after two that are not; the fastest counts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return max(_flops_per_second(size, DTYPES[dtype], repeats) for size in SIZES)
    finally:
        torch.set_num_threads(before)


def _flops_per_second(size: int, dtype: torch.dtype, repeats: int) -> float:
    left, right = torch.randn(2, size, size).to(dtype)
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[2:])
