"""Sampled responses with the verifier's labels: the raw material of every reward-model data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rlhfscale.bed import ladder, tasks
from rlhfscale.bed.demonstrations import encode_prompts, tokens
from rlhfscale.samplers.base import Completions


@dataclass(frozen=True)
class Responses:
    """Labelled responses, ``samples`` of them to each prompt.

    Attributes:
        prompt_ids: int16 [prompt, length], padded on the right.
        prompt_lengths: int16 [prompt].
        response_ids: int16 [prompt, sample, length], end-of-sequence included, padded on the right.
        response_lengths: int16 [prompt, sample].
        finished: bool [prompt, sample], whether the response ended by end-of-sequence.
        gold: float32 [prompt, sample], the task's gold reward.
        exact: bool [prompt, sample], whether the answer is exactly right.
        steps_right: int8 [prompt, sample], number of written steps that follow from the step before.
        steps_written: int8 [prompt, sample].
        family: int8 [prompt], index into tasks.FAMILIES.
        difficulty: int8 [prompt], number of operations.
    """

    prompt_ids: np.ndarray
    prompt_lengths: np.ndarray
    response_ids: np.ndarray
    response_lengths: np.ndarray
    finished: np.ndarray
    gold: np.ndarray
    exact: np.ndarray
    steps_right: np.ndarray
    steps_written: np.ndarray
    family: np.ndarray
    difficulty: np.ndarray

    @property
    def num_prompts(self) -> int:
        return self.gold.shape[0]

    @property
    def num_samples(self) -> int:
        return self.gold.shape[1]

    def head(self, num_prompts: int) -> "Responses":
        """The responses to the first prompts."""
        return Responses(**{name: array[:num_prompts] for name, array in vars(self).items()})

    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and response joined: int64 [prompt, sample, length] padded on the right, and int64 lengths."""
        prompts, samples, width = self.response_ids.shape
        total = self.prompt_lengths[:, None].astype(np.int64) + self.response_lengths
        ids = np.full((prompts, samples, int(total.max())), ladder.PAD_ID, np.int64)
        ids[:, :, : self.prompt_ids.shape[1]] = self.prompt_ids[:, None, : ids.shape[2]]
        for column in range(width):
            row, sample = np.nonzero(column < self.response_lengths)
            ids[row, sample, self.prompt_lengths[row] + column] = self.response_ids[row, sample, column]
        return ids, total

    def answers(self) -> np.ndarray:
        """int64 [prompt, sample]: equal numbers for equal final states within a prompt; -1 for unfinished ones."""
        step = tokens().index(tasks.STEP)
        numbers = np.full(self.gold.shape, -1, np.int64)
        for prompt in range(self.num_prompts):
            seen: dict[tuple[int, ...], int] = {}
            for sample in np.flatnonzero(self.finished[prompt]):
                ids = self.response_ids[prompt, sample, : self.response_lengths[prompt, sample] - 1].tolist()
                last = len(ids) - ids[::-1].index(step) if step in ids else 0
                numbers[prompt, sample] = seen.setdefault(tuple(ids[last:]), len(seen))
        return numbers

    def save(self, file: Path) -> None:
        save_file({name: np.ascontiguousarray(array) for name, array in vars(self).items()}, file)

    @classmethod
    def load(cls, file: Path) -> "Responses":
        return cls(**load_file(file))


def decode(ids: Sequence[int]) -> str:
    """Text of a response's ids without the end-of-sequence token that closes it.

    Any other special token is written out: a response with padding inside is not the same as one without.
    """
    names = tokens()
    return " ".join(names[index] for index in ids if index != ladder.EOS_ID)


def label(problems: Sequence[tasks.Problem], completions: Completions) -> Responses:
    """Grade completions with the tasks' verifiers; ``completions`` holds the samples of each problem in a row."""
    shape = (len(problems), len(completions) // len(problems))
    grades = []
    for index in range(len(completions)):
        text = decode(completions.ids[index, : completions.lengths[index]].tolist())
        grades.append(tasks.grade(problems[index // shape[1]], text, bool(completions.finished[index])))
    names = list(tasks.FAMILIES)
    prompts = encode_prompts(problems)
    prompt_ids = np.full((len(prompts), max(map(len, prompts))), ladder.PAD_ID, np.int16)
    for row, prompt in zip(prompt_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return Responses(
        prompt_ids=prompt_ids,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int16),
        response_ids=completions.ids.reshape(*shape, -1).astype(np.int16),
        response_lengths=completions.lengths.reshape(shape).astype(np.int16),
        finished=completions.finished.reshape(shape),
        gold=np.array([grade.gold for grade in grades], np.float32).reshape(shape),
        exact=np.array([grade.exact for grade in grades]).reshape(shape),
        steps_right=np.array([sum(grade.steps) for grade in grades], np.int8).reshape(shape),
        steps_written=np.array([len(grade.steps) for grade in grades], np.int8).reshape(shape),
        family=np.array([names.index(problem.family) for problem in problems], np.int8),
        difficulty=np.array([problem.difficulty for problem in problems], np.int8),
    )
