"""The prompts of a run as a collection, drawn without replacement: one random permutation of all after another."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np


class Shuffled:
    """Prompts in an order that depends on the seed and the position alone, so that a resumed run draws the same.

    Args:
        prompts: token ids of each prompt.
        seed: decides the order.
        count: number of prompts in an update.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], seed: int, count: int):
        self.prompts, self.seed, self.count = prompts, seed, count
        self.hash = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]

    def __call__(self, update: int) -> list[Sequence[int]]:
        """The prompts of an update."""
        return self._take(2, update * self.count, self.count)

    def replacements(self, start: int, count: int) -> list[Sequence[int]]:
        """Prompts that stand in for those which taught nothing, from an order of their own."""
        return self._take(3, start, count)

    def _take(self, stream: int, start: int, count: int) -> list[Sequence[int]]:
        total, positions = len(self.prompts), np.arange(start, start + count)
        orders = {
            epoch: np.random.default_rng((self.seed, stream, epoch)).permutation(total)
            for epoch in np.unique(positions // total).tolist()
        }
        return [self.prompts[orders[p // total][p % total]] for p in positions.tolist()]
