"""What a sampler returns: the Completion record, and a batch of completions as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: the response's tokens, with the end-of-sequence token if it was reached.
        finish_reason: ``"stop"`` if the response ended by end-of-sequence, ``"length"`` if it was cut.
        logprobs: natural-log probability of each token under the model at ``temperature``. A diagnostic: trainers
            recompute their own.
        temperature: the sampling temperature the log-probabilities are stated at; 0 is greedy, stated at 1.
        seed: the request's seed, which alone decides the draws.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Completions:
    """Many responses as arrays; indexing gives a Completion.

    Attributes:
        ids: int32 [response, length], padded on the right.
        lengths: int64 [response], tokens of each response, end-of-sequence included.
        finished: bool [response], whether the response ended by end-of-sequence.
        logprobs: float32 [response, length], 0 after the end.
        temperature: as in Completion.
        seeds: uint64 [response].
    """

    ids: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    logprobs: np.ndarray
    temperature: float
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Completion:
        length = int(self.lengths[index])
        return Completion(
            token_ids=tuple(self.ids[index, :length].tolist()),
            finish_reason="stop" if self.finished[index] else "length",
            logprobs=tuple(self.logprobs[index, :length].tolist()),
            temperature=self.temperature,
            seed=int(self.seeds[index]),
        )

    def __iter__(self) -> Iterator[Completion]:
        return (self[index] for index in range(len(self)))


def request_seeds(entropy: tuple[int, ...], count: int) -> np.ndarray:
    """uint64 [count]: one seed for each request, from a named stream such as ``(seed, stage)``."""
    return np.random.SeedSequence(entropy).generate_state(count, np.uint64)


def uniforms(seeds: np.ndarray, position: int) -> np.ndarray:
    """float64 [request] in [0, 1): the draw of each request at a token position.

    SplitMix64 (Steele et al. 2014) of seed and position: a request's draws depend on nothing else, so neither on the
    batch it is served in nor on the order.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53
