"""How the C library handles freed memory. Imports no torch."""

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's names of its options, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD."""


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks rather than give each back to the kernel and fault its pages in again.

    Activations of some megabytes come and go thousands of times in an update: measured 9% of PPO's time on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(MMAP_THRESHOLD, 2**30)
        mallopt(TRIM_THRESHOLD, 2**30)
