"""What is computed together: sequences of similar length, and equal prompts as one, with every response behind it.

Attention is causal, so a prompt's states do not depend on the response; a response sees its prompt and itself. Eight
responses of 8 tokens to a prompt of 50 are 114 tokens instead of 464.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

WIDEST = 512
"""Tokens of a pack at most, unless a single sequence is longer: attention grows with the square."""
LEAST_SAVING = 0.15
"""Share of the tokens below which packing is not worth its own operations."""


@dataclass(frozen=True)
class Packed:
    """Packs of one prompt and responses to it.

    Attributes:
        ids: int64 [pack, width], padded on the right with 0.
        position: int64 [pack, width], of each token in its own sequence.
        segment: int64 [pack, width]: 0 in the prompt, 1 .. n in the responses, -1 in padding.
        source: int64 [sequence, length], where each token of the sequences is among [pack x width]; 0 for padding.
    """

    ids: torch.Tensor
    position: torch.Tensor
    segment: torch.Tensor
    source: torch.Tensor

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """[pack, query, key]: 0 where a token sees another, else -inf."""
        query, key = self.segment[:, :, None], self.segment[:, None]
        visible = ((key == 0) | (key == query)).tril()
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """[pack, width, ...] -> [sequence, length, ...]."""
        return states.flatten(0, 1)[self.source]


def pack(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> Packed | None:
    """Lay out sequences that are padded on the right; None where too few prompts are equal for it to save much.

    Args:
        ids: int64 [sequence, length].
        prompt_lengths, lengths: int64 [sequence].
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    in_prompt = column < prompt_lengths[:, None]
    group = _group(torch.where(in_prompt, ids, -1))
    if group is None:
        return None
    group, rank, offset = _members(group, prompt_lengths, lengths - prompt_lengths)
    responses = torch.zeros_like(prompt_lengths).index_add_(0, group, lengths - prompt_lengths)[group]
    count, width = int(group.max()) + 1, int((prompt_lengths + responses).max())
    if count * width > (1 - LEAST_SAVING) * ids.numel():
        return None
    source = group[:, None] * width + torch.where(in_prompt, column, column + offset[:, None])
    real = column < lengths[:, None]
    flat = source[real]
    segment = torch.where(in_prompt, 0, rank[:, None] + 1)

    def laid_out(values: torch.Tensor, padding: int) -> torch.Tensor:
        empty = torch.full((count * width,), padding, device=ids.device)
        return empty.index_copy_(0, flat, values.expand_as(ids)[real]).view(count, width)

    return Packed(laid_out(ids, 0), laid_out(column, 0), laid_out(segment, -1), source * real)


def _group(prompts: torch.Tensor) -> torch.Tensor | None:
    """int64 [sequence], the number of each sequence's prompt; None where no two are equal."""
    weights = torch.arange(1, prompts.shape[1] + 1, device=prompts.device) * 0x9E3779B97F4A7C1 ^ 0x5851F42D4C957F2
    if len(torch.unique((prompts * weights).sum(1))) == len(prompts):  # sums of unequal prompts may agree, never the
        return None  # other way round
    return torch.unique(prompts, dim=0, return_inverse=True)[1]


def _members(
    group: torch.Tensor, prompt_lengths: torch.Tensor, responses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each sequence, int64 [sequence]: its pack, its number in the pack, and the response tokens before its own."""
    room = (WIDEST - int(prompt_lengths.max())) // int(responses.max())
    group = group * len(group) + _rank(group) // max(1, room)
    group = torch.unique(group, return_inverse=True)[1]
    order = torch.argsort(group, stable=True)
    before = responses[order].cumsum(0) - responses[order]
    first = torch.full_like(group, 2**62).scatter_reduce_(0, group[order], before, "amin")
    offset = torch.empty_like(group)
    offset[order] = before - first[group[order]]
    return group, _rank(group), offset


def _rank(group: torch.Tensor) -> torch.Tensor:
    """int64 [sequence]: how many earlier sequences are in the same group."""
    order = torch.argsort(group, stable=True)
    start = torch.searchsorted(group[order], group[order])
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start
    return rank


def by_width(widths: np.ndarray, tokens: int, enough: float = math.inf) -> Iterator[np.ndarray]:
    """Indices in batches of similar width, narrowest first: at most ``tokens`` in each with padding, or one item.

    Args:
        widths: int64 [item], tokens of each.
        enough: a batch of that many tokens takes no item that is more than a tenth wider than its first.
    """
    order = np.argsort(widths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        count, widest = end - start, widths[order[end - 1]]
        following = widths[order[end]] if end < len(order) else None
        full = following is None or (count + 1) * following > tokens
        if full or (count * widest >= enough and following > 1.1 * widths[order[start]]):
            yield order[start:end]
            start = end
