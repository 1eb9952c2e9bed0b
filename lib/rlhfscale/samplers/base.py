"""What every sampler takes and returns: the checks of a call, the responses, and the random numbers of a request.

A sampler is called as ``sampler(model, prompts, seeds=..., max_new_tokens=..., temperature=..., tokenizer=...)`` and
returns `Completions`. A sampler that does not decode ``model`` itself has a method ``push(networks)``; trainers call it
before every roll-out, so that it samples from the current policy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: the response's tokens, with the end-of-sequence token if it was reached.
        finish_reason: ``"stop"`` if the response ended by end-of-sequence, ``"length"`` if it was cut.
        logprobs: natural-log probability of each token under the model at ``temperature``. A diagnostic only: trainers
            compute their own.
        temperature: the sampling temperature. 0 is greedy; log-probabilities are then those at temperature 1.
        seed: the seed of the request, which alone decides its random numbers.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float, ...]
    temperature: float
    seed: int


@dataclass(frozen=True)
class Completions:
    """Many responses as arrays; indexing by a row gives a `Completion`.

    Attributes:
        ids: int32 [response, length], padded on the right.
        lengths: int64 [response], tokens of each response, end-of-sequence included.
        finished: bool [response], whether the response ended by end-of-sequence.
        logprobs: float32 [response, length], 0 after the end.
        temperature: as in `Completion`.
        seeds: uint64 [response].
    """

    ids: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    logprobs: np.ndarray
    temperature: float
    seeds: np.ndarray

    @classmethod
    def empty(cls, seeds: np.ndarray, max_new_tokens: int, temperature: float, pad: int = 0) -> "Completions":
        """Arrays for one response to each seed, to be filled in by `put`."""
        shape = len(seeds), max_new_tokens
        return cls(
            ids=np.full(shape, pad, np.int32),
            lengths=np.zeros(len(seeds), np.int64),
            finished=np.zeros(len(seeds), bool),
            logprobs=np.zeros(shape, np.float32),
            temperature=temperature,
            seeds=seeds,
        )

    def put(self, row: int, ids: Sequence[int], logprobs: Sequence[float], finished: bool) -> None:
        """Fill in one response: its tokens, their log-probabilities, and whether it ended by end-of-sequence."""
        self.ids[row, : len(ids)], self.logprobs[row, : len(ids)] = ids, logprobs
        self.lengths[row], self.finished[row] = len(ids), finished

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
    """Random numbers, float64 [request] in [0, 1), of each request at a token position.

    They are SplitMix64 (Steele et al. 2014) of seed and position, and depend on nothing else: neither on the batch that
    a request is served in nor on the order.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def repeated(prompts: Sequence[Sequence[int]], num_samples: int, temperature: float) -> list[Sequence[int]]:
    """Each prompt ``num_samples`` times in a row, to sample that many responses to it.

    Raises ValueError for fewer than one sample, and for several at temperature 0, which would all be equal.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is not at least 1")
    if num_samples > 1 and temperature == 0:
        raise ValueError(
            f"num_samples: at temperature 0 all {num_samples} samples of a prompt would be equal; take 1, or a higher"
            " temperature"
        )
    return [prompt for prompt in prompts for _ in range(num_samples)]


def end_tokens(*named: int | Sequence[int] | None) -> tuple[int, ...]:
    """All ids that end a response, from what a tokenizer, a config and a generation config name as ``eos_token_id``:
    each none, one or several. A chat model often names several, of which its tokenizer knows one."""
    found = set()
    for eos in named:
        found.update([] if eos is None else eos if isinstance(eos, Sequence) else [eos])
    return tuple(sorted(found))


def check(lengths: np.ndarray, seeds: np.ndarray, max_new_tokens: int, temperature: float, context: int | None) -> None:
    """Raise ValueError for a call that cannot work.

    Args:
        lengths: int64 [prompt], tokens of each.
        seeds: uint64 [prompt], one for each request.
        context: longest sequence the model takes, in tokens; None where it has no limit.
    """
    if len(lengths) == 0:
        raise ValueError("prompts: none given")
    if lengths.min() == 0:
        raise ValueError(f"prompts[{int(lengths.argmin())}] is empty; give at least the begin-of-sequence token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is not at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: {temperature} is not a finite number of at least 0; 0 is greedy")
    if context is not None and lengths.max() + max_new_tokens > context:
        worst = int(lengths.argmax())
        raise ValueError(
            f"prompts[{worst}] has {lengths[worst]} tokens; with max_new_tokens={max_new_tokens} it exceeds the"
            f" model's context of {context}"
        )
    if seeds.shape != lengths.shape or seeds.dtype != np.uint64:
        raise ValueError(f"seeds: need uint64 [{len(lengths)}], got {seeds.dtype} {list(seeds.shape)}")
