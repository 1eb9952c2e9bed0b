"""A sampler that says what it was told to say, for tests of what surrounds one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhfscale.samplers.base import Completions, check, end_tokens

Script = Callable[[Sequence[int], int], Sequence[int]] | Sequence[Sequence[int]]
"""The tokens of a response to a prompt under a seed; or responses, of which a seed takes one."""


class Fake:
    """Answers by a script, as deterministically as the script is.

    Args:
        script: see `Script`. Responses are cut at ``max_new_tokens``, and end with their first end-of-sequence token.
        logprob: of every token.

    Attributes:
        calls: the arguments of each call.
        pushed: the networks of each push.
    """

    def __init__(self, script: Script, logprob: float = -1.0):
        self.script, self.logprob = script, logprob
        self.calls: list[dict[str, Any]] = []
        self.pushed: list[Any] = []

    def push(self, networks: Any) -> None:
        """Take note of what would be sampled from."""
        self.pushed.append(networks)

    def __call__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: np.ndarray,
        max_new_tokens: int,
        temperature: float = 1.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ignore_eos: bool = False,
    ) -> Completions:
        """As `hf.sample`; the model may be None, and then nothing is checked against its context."""
        config = getattr(model, "config", None)
        lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
        check(lengths, seeds, max_new_tokens, temperature, getattr(config, "max_position_embeddings", None))
        self.calls.append({"prompts": prompts, "seeds": seeds, "temperature": temperature, "tokenizer": tokenizer})
        eos = end_tokens((tokenizer or config).eos_token_id if tokenizer or config else None)
        eos = () if ignore_eos else eos
        out = Completions.empty(seeds, max_new_tokens, temperature)
        for row, (prompt, seed) in enumerate(zip(prompts, seeds.tolist(), strict=True)):
            said = list(self.script(prompt, seed) if callable(self.script) else self.script[seed % len(self.script)])
            end = next((i + 1 for i, token in enumerate(said) if token in eos), None)
            said = said[: end or len(said)][:max_new_tokens]
            out.ids[row, : len(said)], out.logprobs[row, : len(said)] = said, self.logprob
            out.lengths[row] = len(said)
            out.finished[row] = said[-1] in eos
        return out
