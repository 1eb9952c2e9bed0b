"""Family ``lists``: transformations of lists of three or four letters."""

from itertools import accumulate

import numpy as np

from rlhfscale.bed.tasks.base import Family, State

LETTERS = tuple("abcdefghijkl")


def _swap_pairs(state: State) -> State:
    swapped = list(state)
    swapped[0 : len(state) - 1 : 2], swapped[1::2] = state[1::2], state[0 : len(state) - 1 : 2]
    return tuple(swapped)


TRANSFORMATIONS = {
    "reverse": lambda s: s[::-1],
    "rotate": lambda s: s[1:] + s[:1],
    "swap_pairs": _swap_pairs,
    "sort": lambda s: tuple(sorted(s)),
    "rotate_back": lambda s: s[-1:] + s[:-1],
    "run_max": lambda s: tuple(accumulate(s, max)),
    "swap_ends": lambda s: s[-1:] + s[1:-1] + s[:1] if len(s) > 1 else s,
    "unique": lambda s: tuple(dict.fromkeys(s)),
}


class Lists(Family):
    """Letters moved about: checking a step is comparing tokens between positions."""

    name = "lists"
    alphabet = LETTERS
    operations = tuple(TRANSFORMATIONS)
    lengths = (3, 4)

    def start(self, rng: np.random.Generator) -> State:
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        return tuple(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))

    def apply(self, operation: str, state: State) -> State:
        if not state:
            raise ValueError("the list is empty")
        return TRANSFORMATIONS[operation](state)
