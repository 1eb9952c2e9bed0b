"""Prompts as users give them: encoded before sampling, and joined with their responses afterwards."""

import json
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from rlhfscale.models.sequences import Conversation, Encoded, Sequences
from rlhfscale.samplers.base import Completions

Prompt = str | Sequence[int] | Sequence[dict[str, str]]
"""Text, token ids, or a conversation for the tokenizer's chat template."""


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[list[int]]:
    """Token ids of each prompt: a text is tokenised, a conversation goes through the chat template and stays beside its
    ids, ids stay.

    Raises ValueError for a prompt with half of a surrogate pair, which no tokenizer takes (names the prompt).
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: one text; give a list of texts")
    encoded = []
    for index, prompt in enumerate(prompts):
        try:
            ids = [int(token) for token in _ids(tokenizer, prompt)]
            encoded.append(Encoded(ids, messages) if (messages := _messages(prompt)) else ids)
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {index} is no text: {error.reason} at character {error.start}") from None
    return encoded


def _messages(prompt: Prompt) -> Conversation | None:
    """The messages of a conversation, also of one that is encoded already."""
    if isinstance(prompt, Encoded):
        return prompt.messages
    return prompt if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], dict) else None


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Sequence[int]:
    if isinstance(prompt, str):
        prompt.encode()  # tokenizers' own error does not say what is wrong
        return tokenizer(prompt)["input_ids"]
    if len(prompt) and isinstance(prompt[0], dict):
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return prompt


def joined(prompts: Sequence[Sequence[int]], completions: Completions, tokenizer: PreTrainedTokenizerBase) -> Sequences:
    """Each prompt joined with its sampled response."""
    width = int(completions.lengths.max())
    rows = [ids[:length] for ids, length in zip(completions.ids[:, :width], completions.lengths, strict=True)]
    return Sequences.join(prompts, rows, completions.finished, tokenizer)
