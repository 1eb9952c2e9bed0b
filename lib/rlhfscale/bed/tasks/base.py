"""What a task is: prompts, demonstrations, a verifier of outcomes and a checker of steps; it owns its gold reward.

The laptop bed's tasks are *chains*: a prompt names one to three operations and a start state, the response writes the
state after each operation, separated by ``;``. Every state is checkable against the one before it, so process labels
come free, and the last state is the answer.

    prompt    ``lists reverse rotate : b d a =``
    response  ``a d b ; d b a``                    (then the end-of-sequence token)

Text is whitespace-separated tokens. Responses are untrusted: the verifier compares tokens and never evaluates them.

Demonstrators are people of different minds: for each operation, a share of them has a `Misconception` and applies a
wrong rule, always the same one. A model that imitates them all knows the right rule and the wrong one, and answers by
either. RLHF does not have to teach it the right rule, only to make it choose that rule.
"""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product

import numpy as np

State = tuple[str, ...]

STEP = ";"
ANSWER = "="
STATE = ":"


@dataclass(frozen=True)
class Problem:
    """One prompt with its truth.

    Attributes:
        family: name of the task family that made it.
        operations: names of the chain's operations, in order.
        start: the start state, as tokens.
        states: the true state after each operation; ``states[-1]`` is the answer.
    """

    family: str
    operations: tuple[str, ...]
    start: State
    states: tuple[State, ...]

    @property
    def prompt(self) -> str:
        return " ".join((self.family, *self.operations, STATE, *self.start, ANSWER))

    @property
    def difficulty(self) -> int:
        """Number of operations in the chain."""
        return len(self.operations)


@dataclass(frozen=True)
class Grade:
    """What the verifier says of one response.

    Attributes:
        gold: the gold reward, the share of answer positions that are right, in [0, 1]; 0 if the response never
            ended or does not write one state for each operation.
        exact: whether the answer is exactly right and the response ended.
        steps: for each written state, whether it follows from the state written before it (process labels).
    """

    gold: float
    exact: bool
    steps: tuple[bool, ...]


@dataclass(frozen=True)
class Misconception:
    """A wrong rule that some demonstrators follow wherever they meet an operation.

    Attributes:
        words: what they do instead, for readers.
        share: share of the demonstrators who do.
        rule: the state that they write, given the state before.
    """

    words: str
    share: float
    rule: Callable[[State], State]


class Family(ABC):
    """A family of chains over its own alphabet. Subclasses define the operations and the start states.

    Class attributes:
        name: first token of the family's prompts.
        alphabet: tokens that states are made of; a slip replaces a token by another one of these.
        operations: names of the operations, most frequent first; the k-th has weight ``1 / k`` (Zipf).
        misconceptions: of each operation, the wrong rule of some demonstrators.
    """

    name: str
    alphabet: tuple[str, ...]
    operations: tuple[str, ...]
    misconceptions: Mapping[str, Misconception]

    @abstractmethod
    def start(self, rng: np.random.Generator) -> State:
        """Draw a start state."""

    @abstractmethod
    def apply(self, operation: str, state: State) -> State:
        """The state after ``operation``. Raises ValueError where a (wrongly written) state does not allow it."""

    def frequencies(self) -> np.ndarray:
        """float64 [operation]: probability of each operation, ``1 / rank`` normalised."""
        weights = 1.0 / np.arange(1, len(self.operations) + 1)
        return weights / weights.sum()

    @cached_property
    def _thresholds(self) -> list[float]:
        return np.cumsum(self.frequencies()).tolist()

    def problem(self, rng: np.random.Generator, chain_weights: Sequence[float]) -> Problem:
        """Draw a chain; ``chain_weights[k]`` is the relative frequency of chains of ``k + 1`` operations."""
        cumulative = list(accumulate(chain_weights))
        length = 1 + bisect_right(cumulative, rng.random() * cumulative[-1])
        ranks = (bisect_right(self._thresholds, draw) for draw in rng.random(length).tolist())
        operations = tuple(self.operations[min(rank, len(self.operations) - 1)] for rank in ranks)
        start = self.start(rng)
        states, state = [], start
        for operation in operations:
            state = self.apply(operation, state)
            states.append(state)
        return Problem(self.name, operations, start, tuple(states))

    def demonstrate(self, problem: Problem, rng: np.random.Generator, slip: float) -> str:
        """The response of a demonstrator, drawn anew for each problem.

        The chain carries on from what was written, so an early slip spoils the answer but not the later steps.

        Args:
            problem: what is answered.
            rng: source of the demonstrator's mind and of the slips.
            slip: probability that a token is replaced by another symbol of the alphabet.
        """
        mind = self._draw_mind(problem, rng)
        written, state = [], problem.start
        for operation in problem.operations:
            state = self.carry_out(operation, state, mind)
            if slip:
                state = tuple(self._slip(token, rng) if rng.random() < slip else token for token in state)
            written.append(" ".join(state))
        return f" {STEP} ".join(written)

    def carry_out(self, operation: str, state: State, mind: Set[str]) -> State:
        """What a demonstrator writes after ``state``; ``mind`` holds the operations that they misunderstand."""
        return self.misconceptions[operation].rule(state) if operation in mind else self.apply(operation, state)

    def _draw_mind(self, problem: Problem, rng: np.random.Generator) -> frozenset[str]:
        """The operations of the problem that a demonstrator misunderstands, each drawn independently by its share."""
        return frozenset(
            operation
            for operation in dict.fromkeys(problem.operations)
            if rng.random() < self.misconceptions[operation].share
        )

    def likelihood(self, problem: Problem, states: Sequence[State], slip: float) -> float:
        """Probability of a demonstrated response with these states: the sum over all minds, exact.

        Raises:
            ValueError: the states are not one for each operation.
        """
        different = tuple(dict.fromkeys(problem.operations))
        total = 0.0
        for misunderstood in product((False, True), repeat=len(different)):
            mind = {operation for operation, wrong in zip(different, misunderstood, strict=True) if wrong}
            shares = [self.misconceptions[operation].share for operation in different]
            chance = float(np.prod([s if wrong else 1 - s for s, wrong in zip(shares, misunderstood, strict=True)]))
            before = problem.start
            for operation, state in zip(problem.operations, states, strict=True):
                chance *= self._writing(self.carry_out(operation, before, mind), state, slip)
                if not chance:  # nobody writes this state, and it may be one that no operation takes
                    break
                before = state
            total += chance
        return total

    def _writing(self, intended: State, written: State, slip: float) -> float:
        """Probability of writing one state where another one is meant."""
        if len(intended) != len(written):
            return 0.0
        slips = sum(a != b for a, b in zip(intended, written, strict=True))
        return (1 - slip) ** (len(written) - slips) * (slip / (len(self.alphabet) - 1)) ** slips

    def grade(self, problem: Problem, response: str, finished: bool = True) -> Grade:
        """Verify a response (text without special tokens); ``finished``: whether it ended by end-of-sequence."""
        written = [tuple(part.split()) for part in response.split(STEP)]
        answer, truth = written[-1], problem.states[-1]
        right = sum(a == b for a, b in zip(answer, truth, strict=False))
        complete = finished and len(written) == problem.difficulty
        return Grade(
            gold=right / max(len(answer), len(truth)) if complete else 0.0,
            exact=complete and answer == truth,
            steps=self._check_steps(problem, written),
        )

    def _check_steps(self, problem: Problem, written: list[State]) -> tuple[bool, ...]:
        labels, state = [], problem.start
        for index, after in enumerate(written):
            labels.append(index < problem.difficulty and self._follows(problem.operations[index], state, after))
            state = after
        return tuple(labels)

    def _follows(self, operation: str, before: State, after: State) -> bool:
        try:
            return self.apply(operation, before) == after
        except ValueError:
            return False

    def _slip(self, token: str, rng: np.random.Generator) -> str:
        shift = 1 + int(rng.integers(len(self.alphabet) - 1))
        return self.alphabet[(self.alphabet.index(token) + shift) % len(self.alphabet)]


def is_held_out(prompt: str, share: float = 0.1) -> bool:
    """Whether a prompt belongs to the evaluation split: decided by its hash, so no training prompt is ever one."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") < share * 2**32
