"""Prompts joined with their responses: what reward models, verifiers and trainers hand to each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

Conversation = Sequence[dict[str, str]]
"""Messages, each with a role and its content."""


class Encoded(list[int]):
    """Token ids of a prompt that was a conversation, with its messages."""

    def __init__(self, ids: Iterable[int], messages: Conversation):
        super().__init__(ids)
        self.messages = messages


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as token ids, joined and padded on the right.

    Attributes:
        ids: int64 [sequence, length].
        prompt_lengths: int64 [sequence], tokens of the prompt, at least 1.
        lengths: int64 [sequence], tokens of prompt and response, end-of-sequence included.
        finished: bool [sequence], whether the response ended by end-of-sequence.
        tokenizer: the ids' tokenizer; needed where text is asked for. A model with another tokenizer gets the text.
        conversations: the messages that each prompt was made from, None for one that was no conversation; None where
            there is no conversation at all.
    """

    ids: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    tokenizer: PreTrainedTokenizerBase | None = None
    conversations: tuple[Conversation | None, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: np.ndarray | slice) -> "Sequences":
        """The sequences at ``index``, without columns that only hold padding."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(lengths) else 0
        talks = self.conversations
        if talks is not None:
            talks = tuple(talks[row] for row in np.arange(len(self))[index].tolist())
        arrays = self.ids[index, :width], self.prompt_lengths[index], lengths, self.finished[index]
        return Sequences(*arrays, self.tokenizer, talks)

    @classmethod
    def join(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        finished: np.ndarray,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_id: int = 0,
    ) -> "Sequences":
        """From the token ids of each prompt and each response; `Encoded` prompts keep their conversation.

        Raises:
            ValueError: an empty prompt or an empty response (names its index).
        """
        for name, rows in (("prompt", prompts), ("response", responses)):
            for index, row in enumerate(rows):
                if len(row) == 0:
                    raise ValueError(f"{name} {index} is empty")
        prompt_lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        lengths = prompt_lengths + np.fromiter(map(len, responses), np.int64, len(responses))
        ids = np.full((len(prompts), int(lengths.max())), pad_id, np.int64)
        for row, prompt, response in zip(ids, prompts, responses, strict=True):
            row[: len(prompt) + len(response)] = [*prompt, *response]
        talks = tuple(getattr(prompt, "messages", None) for prompt in prompts)
        some = talks if any(messages is not None for messages in talks) else None
        return cls(ids, prompt_lengths, lengths, np.asarray(finished, bool), tokenizer, some)

    @property
    def asked(self) -> list[str | Conversation]:
        """Each prompt as it was given: its messages where it was a conversation, else its text."""
        talks = self.conversations or (None,) * len(self)
        return [text if messages is None else messages for text, messages in zip(self.prompts, talks, strict=True)]

    @property
    def prompts(self) -> list[str]:
        """Each prompt's text, special tokens left out."""
        return self._text(np.zeros_like(self.prompt_lengths), self.prompt_lengths)

    @property
    def responses(self) -> list[str]:
        """Each response's text, special tokens left out."""
        return self._text(self.prompt_lengths, self.lengths)

    def _text(self, starts: np.ndarray, ends: np.ndarray) -> list[str]:
        if self.tokenizer is None:
            raise ValueError("these sequences carry no tokenizer, so they have no text; give Sequences(tokenizer=...)")
        rows = [row[start:end].tolist() for row, start, end in zip(self.ids, starts, ends, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
