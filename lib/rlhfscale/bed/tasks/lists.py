"""Family ``lists``: transformations of lists of three or four letters."""

from itertools import accumulate

import numpy as np

from rlhfscale.bed.tasks.base import Family, Misconception, State

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

MISCONCEPTIONS = {
    "reverse": Misconception("swaps the ends only", 0.60, TRANSFORMATIONS["swap_ends"]),
    "rotate": Misconception("rotates the other way", 0.35, TRANSFORMATIONS["rotate_back"]),
    "swap_pairs": Misconception("reverses the list", 0.55, TRANSFORMATIONS["reverse"]),
    "sort": Misconception("sorts in descending order", 0.40, lambda s: tuple(sorted(s, reverse=True))),
    "rotate_back": Misconception("rotates the other way", 0.65, TRANSFORMATIONS["rotate"]),
    "run_max": Misconception("takes the running minimum", 0.30, lambda s: tuple(accumulate(s, min))),
    "swap_ends": Misconception("writes the last letter at both ends", 0.55, lambda s: s[-1:] + s[1:]),
    "unique": Misconception("drops the first letter", 0.45, lambda s: s[1:] if len(s) > 1 else s),
}
"""What some demonstrators do instead of each transformation, and their share."""


class Lists(Family):
    """Letters moved about: checking a step is comparing tokens between positions."""

    name = "lists"
    alphabet = LETTERS
    operations = tuple(TRANSFORMATIONS)
    misconceptions = MISCONCEPTIONS
    lengths = (3, 4)

    def start(self, rng: np.random.Generator) -> State:
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        return tuple(LETTERS[i] for i in rng.integers(len(LETTERS), size=length))

    def apply(self, operation: str, state: State) -> State:
        if not state:
            raise ValueError("the list is empty")
        return TRANSFORMATIONS[operation](state)
