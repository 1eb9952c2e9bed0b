"""Rewards that take time: async functions, and calls of single responses in a pool with a time limit."""

import asyncio
import inspect
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards.base import asked_once, run_async

SingleFunction = Callable[[Any, str], float | Awaitable[float]]
"""``fn(prompt, response)``: the reward of one response, plain or async; prompt and response as in `TextFunction`."""


class RewardFailed(RuntimeError):
    """A call of a reward raised, or took too long. The update that was to learn from it has changed nothing, and can be
    repeated; a run with a folder goes on from its checkpoint. (Rewards that are only watched are asked after it.)"""


class Pooled:
    """A reward that is asked for each response by itself, several at a time: a service, a compiler, a checker.

    Args:
        function: the reward of one response. Plain functions are called in threads, async ones in one event loop.
        workers: calls at the same time.
        timeout_s: longest time of a call, in seconds.

    Raises:
        ValueError: workers or timeout_s is not positive.
    """

    def __init__(self, function: SingleFunction, *, workers: int = 8, timeout_s: float = 60.0):
        if workers < 1:
            raise ValueError(f"workers: {workers} is not at least 1")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: {timeout_s} is not above 0")
        self.function, self.workers, self.timeout_s = function, workers, timeout_s

    def score(self, sequences: Sequences) -> np.ndarray:
        """The scores, float32 [sequence]. Raises RewardFailed, which names the first response that failed."""
        pairs = list(zip(sequences.asked, sequences.responses, strict=True))
        call = self._in_a_loop if inspect.iscoroutinefunction(self.function) else self._in_threads
        return asked_once(lambda: call(pairs), len(pairs))

    def _in_a_loop(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        async def all_of_them() -> list[float]:
            free = asyncio.Semaphore(self.workers)

            async def one(index: int, pair: tuple[str, str]) -> float:
                async with free:
                    try:
                        return await asyncio.wait_for(self.function(*pair), self.timeout_s)
                    except TimeoutError:
                        raise self._slow(index) from None
                    except Exception as error:
                        raise _failed(index, error) from error

            return await asyncio.gather(*(one(index, pair) for index, pair in enumerate(pairs)))

        return run_async(all_of_them())

    def _in_threads(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Daemon threads: one that never returns keeps neither the run nor the interpreter from ending."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        started: dict[int, float] = {}
        for index in range(len(pairs)):
            todo.put(index)

        def work() -> None:
            while True:
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                started[index] = time.monotonic()
                try:
                    value = self.function(*pairs[index])
                    done.put((index, run_async(value) if inspect.isawaitable(value) else value, None))
                except BaseException as error:  # a thread's SystemExit would be a silent end
                    done.put((index, None, error))

        for _ in range(min(self.workers, len(pairs))):
            threading.Thread(target=work, daemon=True).start()
        found: dict[int, float] = {}
        while len(found) < len(pairs):
            self._check_times(todo, started, found)
            try:
                index, value, error = done.get(timeout=min(0.05, self.timeout_s))
            except queue.Empty:
                continue
            if error is not None:
                _drain(todo)
                raise _failed(index, error) from error
            found[index] = value
        return [found[index] for index in range(len(pairs))]

    def _check_times(self, todo: queue.SimpleQueue, started: dict[int, float], found: dict[int, float]) -> None:
        now = time.monotonic()
        late = [index for index, start in started.copy().items() if index not in found and now - start > self.timeout_s]
        if late:
            _drain(todo)
            raise self._slow(min(late))

    def _slow(self, index: int) -> RewardFailed:
        return RewardFailed(f"reward of response {index}: no answer within timeout_s={self.timeout_s:g} seconds")


def _failed(index: int, error: BaseException) -> RewardFailed:
    return RewardFailed(f"reward of response {index}: {type(error).__name__}: {error}")


def _drain(todo: queue.SimpleQueue) -> None:
    """Leave nothing for threads that are still at work."""
    while not todo.empty():
        try:
            todo.get_nowait()
        except queue.Empty:
            return
