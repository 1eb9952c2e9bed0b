"""Responses with labels that reward models are trained on: comparisons, correctness, and right or wrong steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.sequences import Sequences


@dataclass(frozen=True)
class Labelled:
    """Whole responses with labels of one or both kinds.

    Attributes:
        sequences: prompts and responses in the tokens of the model to be trained.
        group: int64 [sequence]; responses with the same number answer one prompt and are compared with each other.
        gold: float32 [sequence], higher is better. Two responses of a group with unequal gold are a comparison; NaN: no
            label.
        correct: float32 [sequence], 1 for right and 0 for wrong; NaN: no label.

    Raises:
        ValueError: an empty response, arrays of unequal length, infinite gold, or correctness that is neither 0, 1 nor
            NaN (names the sample).
    """

    sequences: Sequences
    group: np.ndarray
    gold: np.ndarray
    correct: np.ndarray

    def __post_init__(self):
        nonempty(self.sequences)
        for name in ("group", "gold", "correct"):
            if getattr(self, name).shape != (len(self.sequences),):
                raise ValueError(f"{name} has shape {getattr(self, name).shape} for {len(self.sequences)} sequences")
        _refuse("gold", self.gold, ~np.isinf(self.gold), "must be finite, or NaN for none")
        _refuse("correct", self.correct, _is_label(self.correct), "must be 0 or 1, or NaN for none")

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: np.ndarray | slice) -> "Labelled":
        return Labelled(self.sequences[index], self.group[index], self.gold[index], self.correct[index])

    def labels(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gold and correct (float32 [sequence]) and group (int64 [sequence]) as tensors on a device."""
        return tuple(torch.from_numpy(x).to(device) for x in (self.gold, self.correct, self.group))

    def compared(self) -> np.ndarray:
        """Which responses have a comparison, bool [sequence]: another response of the group has other gold."""
        _, row = np.unique(self.group, return_inverse=True)
        lowest, highest = np.full(len(row), np.inf), np.full(len(row), -np.inf)
        np.fmin.at(lowest, row, self.gold)
        np.fmax.at(highest, row, self.gold)
        return ~np.isnan(self.gold) & (lowest < highest)[row]

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[tuple[str, str, str]],
        tokenizer: PreTrainedTokenizerBase,
        strengths: Sequence[float] | None = None,
    ) -> "Labelled":
        """Labels from texts (prompt, chosen, rejected). Each pair is a group of its own, the chosen response first.

        Args:
            pairs: the texts.
            tokenizer: tokenizer of the model to be trained.
            strengths: gold of each chosen response, 1 unless given; the rejected response has gold 0.

        Raises:
            ValueError: no pair, unequal numbers, or a strength that is not above 0 (names the pair); see also `encode`.
        """
        strengths = np.ones(len(pairs)) if strengths is None else np.asarray(strengths, np.float32)
        if not pairs or len(strengths) != len(pairs):
            raise ValueError(f"{len(pairs)} pairs with {len(strengths)} strengths")
        _refuse("strengths", strengths, strengths > 0, "must be above 0")
        prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
        responses = [response for _, chosen, rejected in pairs for response in (chosen, rejected)]
        gold = np.column_stack([strengths, np.zeros(len(pairs))]).reshape(-1).astype(np.float32)
        sequences = encode(tokenizer, prompts, responses, np.ones(len(prompts), bool))
        return cls(sequences, np.repeat(np.arange(len(pairs)), 2), gold, np.full(len(gold), np.nan, np.float32))

    @classmethod
    def from_labels(cls, rows: Sequence[tuple[str, str, float]], tokenizer: PreTrainedTokenizerBase) -> "Labelled":
        """Labels from texts (prompt, response, correct), with correct 0 or 1. For errors see `encode`."""
        if not rows:
            raise ValueError("rows: no labelled response")
        sequences = encode(tokenizer, [row[0] for row in rows], [row[1] for row in rows], np.ones(len(rows), bool))
        correct = np.array([row[2] for row in rows], np.float32)
        return cls(sequences, np.arange(len(rows)), np.full(len(rows), np.nan, np.float32), correct)

    @classmethod
    def concat(cls, parts: Sequence["Labelled"]) -> "Labelled":
        """Join several data sets, so that batches mix them; groups of different parts stay apart.

        The tokenizer of the first part is kept, so all parts must hold the tokens of one.
        """
        groups, start = [], 0
        for part in parts:
            numbers, row = np.unique(part.group, return_inverse=True)
            groups.append(row + start)
            start += len(numbers)
        sequences = [part.sequences for part in parts]
        width = max(part.ids.shape[1] for part in sequences)
        ids = np.concatenate([np.pad(part.ids, ((0, 0), (0, width - part.ids.shape[1]))) for part in sequences])
        names = "prompt_lengths", "lengths", "finished"
        joined = {name: np.concatenate([getattr(part, name) for part in sequences]) for name in names}
        gold, correct = (np.concatenate([getattr(part, name) for part in parts]) for name in ("gold", "correct"))
        return cls(replace(sequences[0], ids=ids, **joined), np.concatenate(groups), gold, correct)


@dataclass(frozen=True)
class StepLabelled:
    """Responses with a label for each of their steps.

    Attributes:
        sequences: prompts and responses in the tokens of the model to be trained.
        labels: float32 [sequence, step], 1 for right and 0 for wrong; NaN: no label, as after the last step.

    Raises:
        ValueError: an empty response, unequal numbers, or a label that is neither 0, 1 nor NaN (names the sample).
    """

    sequences: Sequences
    labels: np.ndarray

    def __post_init__(self):
        nonempty(self.sequences)
        if self.labels.ndim != 2 or len(self.labels) != len(self.sequences):
            raise ValueError(f"labels have shape {self.labels.shape} for {len(self.sequences)} sequences")
        _refuse("labels", self.labels, _is_label(self.labels).all(1), "must be 0 or 1, or NaN for none")

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: np.ndarray | slice) -> "StepLabelled":
        return StepLabelled(self.sequences[index], self.labels[index])


def step_ends(sequences: Sequences, step_ids: Sequence[int]) -> np.ndarray:
    """The response tokens that close a step, bool [sequence, length]. The last token always closes the last step."""
    position = np.arange(sequences.ids.shape[1])
    response = (position >= sequences.prompt_lengths[:, None]) & (position < sequences.lengths[:, None])
    last = position == sequences.lengths[:, None] - 1
    return response & np.isin(sequences.ids, step_ids) | last


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], finished: np.ndarray
) -> Sequences:
    """Encode texts as sequences.

    A sequence is the prompt with the tokenizer's opening special tokens, then the response, encoded by itself, then the
    end-of-sequence token where ``finished`` (bool [sequence]).

    Raises:
        ValueError: an empty prompt or response; a symbol that the tokenizer has no token for (names the sample); or a
            finished response and a tokenizer without an end-of-sequence token.
    """
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None and np.any(finished):
        raise ValueError("the tokenizer has no end-of-sequence token, so no response can be finished")
    heads = tokenizer(list(prompts)).input_ids
    heads = [row[:-1] if row and row[-1] == eos else row for row in heads]  # some tokenizers close every text
    tails = tokenizer(list(responses), add_special_tokens=False).input_ids
    unknown = {tokenizer.unk_token_id, pad} - {None, bos, eos}
    for index, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        if not unknown.isdisjoint(head + tail):
            raise ValueError(f"sample {index} holds a symbol that the tokenizer has no token for")
    tails = [[*tail, eos] if done else tail for tail, done in zip(tails, finished, strict=True)]
    return Sequences.join(heads, tails, finished, tokenizer, pad_id=0 if pad is None else pad)


def nonempty(sequences: Sequences) -> Sequences:
    """The sequences themselves. Raises ValueError where a response is empty (names the first)."""
    empty = np.flatnonzero(sequences.lengths <= sequences.prompt_lengths)
    if len(empty):
        raise ValueError(f"response {empty[0]} is empty")
    return sequences


def _is_label(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) | (values == 0) | (values == 1)


def _refuse(name: str, values: np.ndarray, good: np.ndarray, rule: str) -> None:
    if not good.all():
        sample = int(np.flatnonzero(~good)[0])
        raise ValueError(f"{name}: sample {sample} has {np.array2string(np.asarray(values[sample]))}; it {rule}")
