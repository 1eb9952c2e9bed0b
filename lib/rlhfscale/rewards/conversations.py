"""Sequences in a reward model's own tokens: by its own chat template, where a prompt was a conversation."""

import warnings
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.sequences import Conversation, Sequences
from rlhfscale.rewards.labelled import encode, nonempty


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether an id means the same to both: same vocabulary, same begin and end of sequence."""
    special = (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id)
    return a is b or (special and a.get_vocab() == b.get_vocab())


class OwnTokens:
    """Turns sequences of any tokenizer into those of one. The comparison of two tokenizers is kept.

    Args:
        tokenizer: the reward model's; None takes any sequence's ids for its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self._compared: tuple[PreTrainedTokenizerBase | None, bool] = (None, True)
        self._told = False

    def __call__(self, sequences: Sequences) -> Sequences:
        """The sequences in the tokenizer's own tokens.

        A conversation is rendered by the tokenizer's own chat template, with the response as the assistant's message;
        without a template it is read as plain text. Other ids go straight through where both tokenizers have the same
        vocabulary and the same begin and end of sequence (padding is never looked at). Else the texts are encoded
        again, see `labelled.encode`; special tokens of the other tokenizer are lost.

        Raises:
            ValueError: an empty response (names its index), or a conversation that the template refuses.
        """
        nonempty(sequences)
        own, other = self.tokenizer, sequences.tokenizer
        if own is None or other is None:
            return sequences
        same, talks = self.same(other), sequences.conversations
        if talks is None or (same and own.chat_template == other.chat_template):
            return sequences if same else encode(own, sequences.prompts, sequences.responses, sequences.finished)
        if own.chat_template is None:
            return self._plain(sequences)
        return self._rendered(sequences, talks, same)

    def same(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether another tokenizer has the same tokens, see `same_tokens`."""
        if self._compared[0] is not tokenizer:
            self._compared = (tokenizer, same_tokens(self.tokenizer, tokenizer))
        return self._compared[1]

    def check(self, conversations: Sequence[Conversation]) -> None:
        """Raise ValueError for a conversation that the template refuses, such as one with a system message."""
        if self.tokenizer is not None and self.tokenizer.chat_template is not None:
            for messages in conversations:
                render(self.tokenizer, messages, "", True)

    def _plain(self, sequences: Sequences) -> Sequences:
        """What was said, without the other model's template around it."""
        if not self._told:
            warnings.warn("the reward model has no chat template: it reads conversations as plain text", stacklevel=4)
            self._told = True
        prompts = [
            text if messages is None else "\n".join(message["content"] for message in messages)
            for text, messages in zip(sequences.prompts, sequences.conversations, strict=True)
        ]
        return encode(self.tokenizer, prompts, sequences.responses, sequences.finished)

    def _rendered(self, sequences: Sequences, talks: Sequence[Conversation | None], same: bool) -> Sequences:
        heads, tails = [], []
        texts = sequences.responses
        for row, messages in enumerate(talks):
            if messages is not None:
                head, tail = render(self.tokenizer, messages, texts[row], bool(sequences.finished[row]))
            else:
                one = sequences[row : row + 1]
                one = one if same else encode(self.tokenizer, one.prompts, one.responses, one.finished)
                start, end = int(one.prompt_lengths[0]), int(one.lengths[0])
                head, tail = one.ids[0, :start].tolist(), one.ids[0, start:end].tolist()
            heads.append(head)
            tails.append(tail)
        pad = self.tokenizer.pad_token_id
        return Sequences.join(heads, tails, np.asarray(sequences.finished), self.tokenizer, 0 if pad is None else pad)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Conversation, response: str, finished: bool
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation up to the response, and of the response as the assistant's message.

    A response that was cut is not closed. Raises ValueError where the template refuses the conversation.
    """
    said = [*messages, {"role": "assistant", "content": response}]
    try:
        head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        closed = {} if finished or not response else {"continue_final_message": True}
        whole = tokenizer.apply_chat_template(said, return_dict=True, **closed)["input_ids"]
    except Exception as error:  # jinja's errors, and a template's own by raise_exception
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"the reward model's chat template refuses a conversation of {roles}: {error}") from None
    start = 0
    while start < min(len(head), len(whole) - 1) and head[start] == whole[start]:
        start += 1
    if start == 0:
        raise ValueError("the reward model's chat template does not begin alike with and without a response")
    return list(whole[:start]), list(whole[start:])
