"""Family ``registers``: a machine of three registers that hold one digit each."""

from itertools import combinations, permutations

import numpy as np

from rlhfscale.bed.tasks.base import Family, State

DIGITS = tuple("0123456789")
REGISTERS = 3


def _operations() -> tuple[str, ...]:
    """Every instruction, kinds interleaved so that each kind has frequent and rare members."""
    kinds = [
        [f"inc_{i}" for i in range(REGISTERS)],
        [f"swap_{i}{j}" for i, j in combinations(range(REGISTERS), 2)],
        [f"dec_{i}" for i in range(REGISTERS)],
        [f"copy_{i}{j}" for i, j in permutations(range(REGISTERS), 2)],
        [f"zero_{i}" for i in range(REGISTERS)],
    ]
    longest = max(map(len, kinds))
    return tuple(kind[rank] for rank in range(longest) for kind in kinds if rank < len(kind))


class Registers(Family):
    """Digits changed in place: most of the state is copied, one or two registers change.

    ``inc_i``/``dec_i`` add or subtract 1 modulo 10, ``swap_ij`` exchanges, ``copy_ij`` copies register i into j,
    ``zero_i`` clears.
    """

    name = "registers"
    alphabet = DIGITS
    operations = _operations()

    def start(self, rng: np.random.Generator) -> State:
        return tuple(DIGITS[i] for i in rng.integers(len(DIGITS), size=REGISTERS))

    def apply(self, operation: str, state: State) -> State:
        if len(state) != REGISTERS or not set(state) <= set(DIGITS):
            raise ValueError(f"a state is {REGISTERS} digits, not {' '.join(state)!r}")
        kind, where = operation.split("_")
        after, target = list(state), int(where[-1])
        if kind == "inc":
            after[target] = DIGITS[(int(state[target]) + 1) % 10]
        elif kind == "dec":
            after[target] = DIGITS[(int(state[target]) - 1) % 10]
        elif kind == "zero":
            after[target] = DIGITS[0]
        elif kind == "copy":
            after[target] = state[int(where[0])]
        else:
            source = int(where[0])
            after[source], after[target] = state[target], state[source]
        return tuple(after)
