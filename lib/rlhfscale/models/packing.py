"""What is computed together: sequences of similar length, and equal prompts as one, with every response behind it.

Attention is causal, so a prompt's states do not depend on the response; a response sees its prompt and itself. Eight
responses of 8 tokens to a prompt of 50 are 114 tokens instead of 464.
"""

from dataclasses import dataclass
from typing import Any

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
        widths: int64 [pack], tokens of each.
        source: int64 [sequence, length], where each token of the sequences is among [pack x width]; 0 for padding.
    """

    ids: torch.Tensor
    position: torch.Tensor
    segment: torch.Tensor
    widths: torch.Tensor
    source: torch.Tensor


def bias(segment: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[pack, query, key] for segments [pack, width] as in `Packed`: 0 where a token sees another, else -inf."""
    query, key = segment[:, :, None], segment[:, None]
    visible = ((key == 0) | (key == query)).tril()
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def pack(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> Packed | None:
    """Lay out sequences that are padded on the right; None where too few prompts are equal for it to save much.

    Args:
        ids: int64 [sequence, length].
        prompt_lengths, lengths: int64 [sequence].
    """
    column = torch.arange(ids.shape[1], device=ids.device)
    in_prompt = column < prompt_lengths[:, None]
    group = _group(torch.where(in_prompt, ids, -1), LEAST_SAVING * ids.numel() / int(prompt_lengths.max()))
    if group is None:
        return None
    group, rank, offset = _members(group, prompt_lengths, lengths - prompt_lengths)
    responses = torch.zeros_like(prompt_lengths).index_add_(0, group, lengths - prompt_lengths)[group]
    count, widths = int(group.max()) + 1, prompt_lengths + responses
    width = int(widths.max())
    if count * width > (1 - LEAST_SAVING) * ids.numel():
        return None
    source = group[:, None] * width + torch.where(in_prompt, column, column + offset[:, None])
    real = column < lengths[:, None]
    flat = source[real]
    segment = torch.where(in_prompt, 0, rank[:, None] + 1)

    def laid_out(values: torch.Tensor, padding: int) -> torch.Tensor:
        empty = torch.full((count * width,), padding, device=ids.device)
        return empty.index_copy_(0, flat, values.expand_as(ids)[real]).view(count, width)

    widths = widths.new_zeros(count).index_copy_(0, group, widths)  # equal within a group
    return Packed(laid_out(ids, 0), laid_out(column, 0), laid_out(segment, -1), widths, source * real)


def _group(prompts: torch.Tensor, least: float) -> torch.Tensor | None:
    """int64 [sequence], the number of each sequence's prompt; None where fewer than ``least`` repeat another's."""
    weights = torch.arange(1, prompts.shape[1] + 1, device=prompts.device) * 0x9E3779B97F4A7C1 ^ 0x5851F42D4C957F2
    sums = torch.unique((prompts * weights).sum(1))  # of unequal prompts they may agree, never the other way round
    if len(prompts) - len(sums) < least:
        return None
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


def cut(widths: np.ndarray, tokens: int, a_part: int = 256) -> list[np.ndarray]:
    """Indices of items to be computed together, narrowest first: the cuts between widths that cost least, padding
    counted. What is then more than one part can hold is split evenly.

    Args:
        widths: int64 [item], tokens of each.
        tokens: of one part at most, padding included; an item that is wider is a part of its own.
        a_part: what one more part costs, in tokens.

    Returns:
        for each part, int64 [item].
    """
    order = np.argsort(widths, kind="stable")
    kinds, counts = np.unique(widths, return_counts=True)
    first = np.concatenate([[0], counts.cumsum()])  # of each width, in that order
    cost, begin = np.zeros(len(kinds) + 1), np.zeros(len(kinds) + 1, np.int64)
    for end, width in enumerate(kinds.tolist(), 1):  # the best parts of all items up to this width
        number = first[end] - first[:end]
        options = cost[:end] + number * width + a_part * _num_parts(number, width, tokens)
        begin[end] = options.argmin()
        cost[end] = options[begin[end]]
    parts, end = [], len(kinds)
    while end:
        members = order[first[begin[end]] : first[end]]
        parts.append(np.array_split(members, _num_parts(len(members), int(kinds[end - 1]), tokens)))
        end = begin[end]
    return [part for together in reversed(parts) for part in together]


def _num_parts(number: Any, width: int, tokens: int) -> Any:
    return -(-number // max(1, tokens // width))
