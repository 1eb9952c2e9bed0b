"""Which rule does a model follow? Its habits, by operation, read off its responses."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhfscale.bed import tasks
from rlhfscale.bed.responses import Responses, decode


@dataclass(frozen=True)
class Habits:
    """How often each rule was followed, among the steps that can tell.

    A step tells where the right rule and the wrong one lead to different states from the state written before it.

    Attributes:
        operations: names of the operations of every family.
        shares: float64 [operation], the share of the demonstrators who follow the right rule.
        right: int64 [operation, prompt], steps of a prompt's responses that follow the right rule.
        wrong: int64 [operation, prompt], steps that follow the misconception.
        other: int64 [operation, prompt], steps that follow neither.
    """

    operations: tuple[str, ...]
    shares: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    other: np.ndarray


def habits(problems: Sequence[tasks.Problem], responses: Responses) -> Habits:
    """The rules that responses follow; ``responses`` holds the samples to each of the problems."""
    known = {name: each for family in tasks.FAMILIES.values() for name, each in family.misconceptions.items()}
    operations = tuple(known)
    counts = np.zeros((3, len(operations), len(problems)), np.int64)
    for row, problem in enumerate(problems):
        for sample in range(responses.num_samples):
            length = responses.response_lengths[row, sample]
            text = decode(responses.response_ids[row, sample, :length].tolist())
            for operation, outcome in _followed(problem, text):
                counts[outcome, operations.index(operation), row] += 1
    return Habits(operations, np.array([1 - known[name].share for name in operations]), *counts)


def _followed(problem: tasks.Problem, response: str) -> list[tuple[str, int]]:
    """Operation and rule (0 right, 1 wrong, 2 neither) of each step of a response that tells."""
    family, before, found = tasks.FAMILIES[problem.family], problem.start, []
    written = [tuple(part.split()) for part in response.split(tasks.STEP)]
    for operation, after in zip(problem.operations, written, strict=False):
        try:
            right, wrong = family.apply(operation, before), family.misconceptions[operation].rule(before)
        except ValueError:  # the state before is none of the family's, so no rule applies to it
            break
        if right != wrong:
            found.append((operation, 0 if after == right else 1 if after == wrong else 2))
        before = after
    return found
