"""Family ``registers``: a machine of three registers that hold one digit each."""

from functools import partial
from itertools import combinations, permutations
from typing import ClassVar

import numpy as np

from rlhfscale.bed.tasks.base import Family, Misconception, State

DIGITS = tuple("0123456789")
REGISTERS = 3


INSTRUCTIONS = {
    "inc": [f"inc_{i}" for i in range(REGISTERS)],
    "swap": [f"swap_{i}{j}" for i, j in combinations(range(REGISTERS), 2)],
    "dec": [f"dec_{i}" for i in range(REGISTERS)],
    "copy": [f"copy_{i}{j}" for i, j in permutations(range(REGISTERS), 2)],
    "zero": [f"zero_{i}" for i in range(REGISTERS)],
}
"""Every instruction, by its kind. The last digits name the registers that it reads or changes."""

MISCONCEPTIONS = {
    "inc": ("adds 2", (0.60, 0.35, 0.55)),
    "swap": ("copies the second register into the first", (0.40, 0.65, 0.30)),
    "dec": ("subtracts 2", (0.55, 0.40, 0.65)),
    "copy": ("copies the other way", (0.30, 0.60, 0.55, 0.35, 0.70, 0.45)),
    "zero": ("writes a 1", (0.65, 0.45, 0.30)),
}
"""What some demonstrators do instead, by kind, and their share for each instruction of the kind."""


def _execute(kind: str, where: str, state: State) -> State:
    """The right rule."""
    after, source, target = list(state), int(where[0]), int(where[-1])
    if kind == "inc":
        after[target] = _plus(state[target], 1)
    elif kind == "dec":
        after[target] = _plus(state[target], -1)
    elif kind == "zero":
        after[target] = DIGITS[0]
    elif kind == "copy":
        after[target] = state[source]
    else:
        after[source], after[target] = state[target], state[source]
    return tuple(after)


def _misunderstand(kind: str, where: str, state: State) -> State:
    """The wrong rule of MISCONCEPTIONS."""
    after, source, target = list(state), int(where[0]), int(where[-1])
    if kind == "inc":
        after[target] = _plus(state[target], 2)
    elif kind == "dec":
        after[target] = _plus(state[target], -2)
    elif kind == "zero":
        after[target] = DIGITS[1]
    else:  # copy and swap
        after[source] = state[target]
    return tuple(after)


def _plus(digit: str, number: int) -> str:
    return DIGITS[(int(digit) + number) % 10]


def _interleaved() -> tuple[str, ...]:
    """Every instruction, kinds in turn, so that each kind has frequent and rare members."""
    longest = max(map(len, INSTRUCTIONS.values()))
    return tuple(kind[rank] for rank in range(longest) for kind in INSTRUCTIONS.values() if rank < len(kind))


class Registers(Family):
    """Digits changed in place: most of the state is copied, one or two registers change.

    ``inc_i``/``dec_i`` add or subtract 1 modulo 10, ``swap_ij`` exchanges, ``copy_ij`` copies register i into j,
    ``zero_i`` clears.
    """

    name = "registers"
    alphabet = DIGITS
    operations = _interleaved()
    misconceptions: ClassVar[dict[str, Misconception]] = {
        name: Misconception(words, share, partial(_misunderstand, *name.split("_")))
        for kind, (words, shares) in MISCONCEPTIONS.items()
        for name, share in zip(INSTRUCTIONS[kind], shares, strict=True)
    }

    def start(self, rng: np.random.Generator) -> State:
        return tuple(DIGITS[i] for i in rng.integers(len(DIGITS), size=REGISTERS))

    def apply(self, operation: str, state: State) -> State:
        if len(state) != REGISTERS or not set(state) <= set(DIGITS):
            raise ValueError(f"a state is {REGISTERS} digits, not {' '.join(state)!r}")
        return _execute(*operation.split("_"), state)
