"""Questions for pretrained language models: generators of reasoning-gym with one number as the answer.

A response is graded by the last number in it, whatever words are around it, so that a model is not taught the format
alone; whether the whole response is just the answer is reported beside. The verdict is that of the generator's own
verifier. A question is held out by a hash of its text, so no seed ever shows it in training.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

SYSTEM = "Reply with only the final answer."
"""What every conversation begins with."""

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 20},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 12},
    "letter_counting": {"min_words": 2, "max_words": 2},
    "chain_sum_hard": {"min_terms": 5, "max_terms": 5, "min_digits": 3, "max_digits": 3},
    "products_hard": {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3},
    "gcd_hard": {"min_numbers": 2, "max_numbers": 2, "min_value": 100, "max_value": 999},
    "lcm_hard": {"min_numbers": 2, "max_numbers": 2, "min_value": 20, "max_value": 99},
    "letter_counting_hard": {"min_words": 16, "max_words": 16},
}
"""Settings of each task's reasoning-gym generator. The hard ones, answered without a step in between, are for models of
billions of parameters, to which the others leave nothing to learn."""

HELD_OUT_SHARE = 0.4
ATTEMPTS = 40
"""Questions drawn for each one asked for, before there are held to be too few."""
NUMBER = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        task: name of its generator.
        text: as reasoning-gym words it.
        answer: the right answer, a number as text.
    """

    task: str
    text: str
    answer: str

    @property
    def conversation(self) -> list[dict[str, str]]:
        """For a tokenizer's chat template."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


def questions(task: str, split: str, count: int, seed: int) -> list[Question]:
    """Questions of one task; in ``"eval"`` all different, in ``"train"`` as they are drawn.

    Raises:
        ValueError: an unknown task or split, or fewer held-out questions than asked for.
        ModuleNotFoundError: reasoning-gym is not installed; the message names the command.
    """
    if task not in TASKS:
        raise ValueError(f"tasks: {task!r} is not one of {', '.join(TASKS)}")
    if split not in ("train", "eval"):
        raise ValueError(f"split: {split!r} is not one of 'train', 'eval'")
    stream = _gym().create_dataset(_generator(task), size=ATTEMPTS * count, seed=seed, **TASKS[task])
    found: list[Question] = []
    seen: set[str] = set()
    for entry in stream:
        text = entry["question"]
        if is_held_out(text) != (split == "eval") or (split == "eval" and text in seen):
            continue
        seen.add(text)
        found.append(Question(task, text, str(entry["answer"])))
        if len(found) == count:
            return found
    raise ValueError(
        f"{task}: only {len(found)} of {count} {split} questions in {ATTEMPTS * count} draws; ask for less"
    )


def _generator(task: str) -> str:
    """The name of a task's generator in reasoning-gym."""
    return task.removesuffix("_hard")


def is_held_out(text: str) -> bool:
    """Whether a question belongs to the evaluation split, whatever the seed."""
    return hashlib.sha256(text.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def answer_in(response: str) -> str:
    """The last number of a response, as text; empty where there is none."""
    numbers = NUMBER.findall(response)
    return numbers[-1] if numbers else ""


def grade(question: Question, response: str) -> bool:
    """Whether the generator's verifier accepts the last number of the response. The response is untrusted text."""
    return _verdict(question, answer_in(response))


def is_bare(question: Question, response: str) -> bool:
    """Whether the verifier accepts the whole response: the answer and nothing else."""
    return _verdict(question, response.strip())


def _verdict(question: Question, answer: str) -> bool:
    entry = {"answer": question.answer, "metadata": {"source_dataset": _generator(question.task)}}
    return bool(answer) and _verifier(question.task)(answer, entry) == 1.0


@lru_cache
def _verifier(task: str):
    return _gym().create_dataset(_generator(task), size=1, seed=0, **TASKS[task]).score_answer


def _gym():
    try:
        import reasoning_gym
    except ImportError as error:
        message = "the reasoning tasks need reasoning-gym; install it with: make setup EXTRAS=smollm2"
        raise ModuleNotFoundError(message) from error
    return reasoning_gym


def to_rows(found: Sequence[Question]) -> list[dict[str, str]]:
    return [asdict(question) for question in found]
