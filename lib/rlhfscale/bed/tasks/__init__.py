"""The laptop bed's universe of tasks: families of chains, their mixture, their splits and their vocabulary."""

from collections.abc import Iterator, Sequence

import numpy as np

from rlhfscale.bed.tasks.base import ANSWER, STATE, STEP, Family, Grade, Misconception, Problem, is_held_out
from rlhfscale.bed.tasks.lists import Lists
from rlhfscale.bed.tasks.registers import Registers

FAMILIES: dict[str, Family] = {family.name: family for family in (Lists(), Registers())}
CHAIN_WEIGHTS = (0.5, 0.3, 0.2)
"""Relative frequency of chains of one, two and three operations."""

MAX_PROMPT_TOKENS = 11
"""Longest prompt: begin-of-sequence, family, three operations, ``:``, four letters, ``=``."""
MAX_RESPONSE_TOKENS = 15
"""Longest right response: three states of four letters, two separators, end-of-sequence."""

__all__ = [
    "FAMILIES", "Family", "Grade", "Misconception", "Problem", "grade", "is_held_out", "problems", "vocabulary"
]  # fmt: skip


def problems(seed: Sequence[int], split: str, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Problem]:
    """An endless stream of problems, the families in turn.

    Args:
        seed: entropy of the stream, e.g. ``(seed, stage number)``; equal seeds give equal streams.
        split: ``"train"`` or ``"eval"``; the two never share a prompt.
        families: names from FAMILIES.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'eval'")
    if not families or not set(families) <= set(FAMILIES):
        raise ValueError(f"families: {tuple(families)} is not a choice of one or more of {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    while True:
        for name in families:
            while True:
                problem = FAMILIES[name].problem(rng, CHAIN_WEIGHTS)
                if is_held_out(problem.prompt) == (split == "eval"):
                    break
            yield problem


def grade(problem: Problem, response: str, finished: bool = True) -> Grade:
    """Verify a response with the verifier of the problem's family."""
    return FAMILIES[problem.family].grade(problem, response, finished)


def vocabulary() -> tuple[str, ...]:
    """Every token of the universe's prompts and responses, without the special tokens."""
    tokens = [STEP, ANSWER, STATE]
    for family in FAMILIES.values():
        tokens += [family.name, *family.operations, *family.alphabet]
    return tuple(tokens)
