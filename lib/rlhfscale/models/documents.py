"""Token sequences of ragged length, and batches of them that waste little padding. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PAD_ID = 0
"""Of padding on the right. Nothing tells padding by this id: lengths do."""


@dataclass(frozen=True)
class Documents:
    """Token sequences of ragged length.

    Attributes:
        ids: int64 [document, length], padded on the right with PAD_ID.
        lengths: int64 [document], true lengths.
        prompt_lengths: int64 [document], how many leading tokens are the prompt; training on responses skips them.
    """

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def bucketed_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """One epoch of index batches in which documents have similar lengths, so that little padding is computed.

    Documents are shuffled, sorted by length within groups of 32 batches, and the batches of a group are shuffled.
    """
    order = rng.permutation(len(lengths))
    group = 32 * batch_size
    for start in range(0, len(order), group):
        members = order[start : start + group]
        members = members[np.argsort(lengths[members], kind="stable")]
        chunks = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        for index in rng.permutation(len(chunks)):
            yield chunks[index]


def pad(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Sequences as int64 [sequence, longest], padded on the right with PAD_ID."""
    padded = np.full((len(sequences), max(map(len, sequences))), PAD_ID, dtype=np.int64)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded
