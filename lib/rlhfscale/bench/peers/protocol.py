"""The line protocol between a benchmark and the process that runs one side of it.

Shared by every side, so nothing here imports rlhfscale: the peers' scripts run in environments of their own. A child
reads its job from its first argument, sets up, does one untimed warm-up step and prints ``{"ready": true, ...}``. For
each line ``go`` on standard input it does one step and prints one JSON line. It ends when standard input ends.
Standard output holds only these lines: what libraries print there goes to standard error.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Child:
    """This process's end of the protocol.

    Attributes:
        job: what the benchmark asked for; the fields are each script's own, ``threads`` is everyone's.
    """

    def __init__(self) -> None:
        self._lines = _private_stdout()
        self.job = read_job(sys.argv[1])
        import torch

        torch.set_num_threads(self.job["threads"])
        torch.manual_seed(self.job.get("seed", 0))

    def ready(self, **about: Any) -> None:
        """Say that set-up and warm-up are over; ``about`` travels with it."""
        self._write({"ready": True, **about})

    def wait(self) -> bool:
        """Block until the next ``go``. False: standard input has ended, so should the process."""
        for line in sys.stdin:
            if line.strip() == "go":
                return True
            if line.strip():
                raise ValueError(f"standard input: expected 'go', got {line.strip()!r}")
        return False

    def start(self) -> None:
        """Start the clocks of a step."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def report(self, **counts: Any) -> None:
        """Stop the clocks and print the step's result.

        ``seconds`` is wall time, ``cpu_seconds`` processor time of all threads (less than wall time on one thread
        means that something else had the core), ``peak_rss_bytes`` the process's peak resident memory so far.
        """
        clocks = {"seconds": time.perf_counter() - self._wall, "cpu_seconds": time.process_time() - self._cpu}
        self._write({**clocks, "peak_rss_bytes": peak_rss_bytes(), **counts})

    def serve(self, step: Callable[[], dict[str, Any]], **about: Any) -> None:
        """Warm up with one counted step, then run a step for each ``go``; for sides that own their loop.

        Args:
            step: does one step and returns its counts.
            about: joins the ready line, beside ``flops``.
        """
        with counter() as flops:
            step()
        self.ready(flops=flops.get_total_flops(), **about)
        while self.wait():
            self.start()
            self.report(**step())

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()


class Ended(Exception):
    """Standard input has ended: leave a trainer's loop, which has no other way out."""


def lockstep(child: Child, every: int, counts: dict[str, Any]) -> Any:
    """A transformers callback that holds a trainer's loop until the benchmark says ``go``, after a warm-up.

    A step of the protocol is ``every`` optimiser steps of the trainer, timed from one ``on_step_end`` to another: all
    that its loop does in between, loading data and logging included. `Ended` comes out of ``trainer.train()``.

    Args:
        child: the protocol's end.
        every: optimiser steps (for trl's PPO: updates) to a ``go``.
        counts: what each of them covers.
    """
    from transformers import TrainerCallback

    class Lockstep(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.warm_up = counter()
            self.warm_up.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every:
                return
            if state.global_step == every:
                self.warm_up.__exit__(None, None, None)
                child.ready(flops=self.warm_up.get_total_flops())
            else:
                child.report(**counts)
            if not child.wait():
                raise Ended
            child.start()

    return Lockstep()


def read_job(argument: str) -> dict[str, Any]:
    """A job from inline JSON or from the path of a JSON file."""
    return json.loads(argument if argument.lstrip().startswith("{") else Path(argument).read_text())


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def counter() -> Any:
    """A FlopCounterMode that also counts the CPU's fused attention and sums in place, which PyTorch 2.13 leaves out.

    A multiplication and an addition are two FLOPs. Matrix products, convolutions and attention are counted, attention
    as if dense (both products over all pairs of positions, causal or not); element-wise work is not.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def products(query: Any, key: Any, value: Any) -> int:
        batch, heads, length, width = query
        return 2 * batch * heads * length * key[-2] * (width + value[-1])

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return products(query, key, value)

    def backward(_: Any, query: Any, key: Any, value: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
        # scores again; gradients of values, of probabilities, of queries and of keys: five products for two
        return products(query, key, value) * 5 // 2

    def product(x: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 2 * math.prod(out_shape) * x[-1]

    def added(_: Any, left: Any, right: Any, *__: Any, out_shape: Any = None, **___: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    formulas = {
        torch.ops.aten.addmm_: added,  # torch counts those that are not in place
        torch.ops.mkldnn._linear_pointwise: product,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _private_stdout() -> TextIO:
    """The process's standard output, for our lines alone; whatever else prints there goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return lines
