"""The in-process sampler: a batched decoding loop over a transformers model with its key-value cache.

A prompt that is given several times is read once. A Llama on a CPU is decoded by `llama`, several times as fast.
Where processes hold shares of the model, they take as many steps as the one with the most.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rlhfscale.models import llama, parallel, sharding
from rlhfscale.samplers.base import Completions, check, end_tokens, uniforms


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 1024,
    tokenizer: PreTrainedTokenizerBase | None = None,
    ignore_eos: bool = False,
) -> Completions:
    """Sample one response for each prompt.

    Args:
        model: a causal language model in evaluation mode.
        prompts: token ids of each prompt. For several responses to a prompt, repeat it.
        seeds: uint64 [prompt], one for each request; equal seeds and prompts give equal responses.
        max_new_tokens: responses are cut there.
        temperature: 0 is greedy.
        batch_size: requests decoded together, of similar prompt length.
        tokenizer: names the end-of-sequence token; without one the model's config does. The ids that the model's
            generation config names end a response too.
        ignore_eos: sample all ``max_new_tokens``, for benchmarks.

    Raises:
        ValueError: an empty prompt, a prompt that does not fit into the context, or not one seed for each prompt.
    """
    lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
    check(lengths, seeds, max_new_tokens, temperature, getattr(model.config, "max_position_embeddings", None))
    named = model.config.eos_token_id if tokenizer is None else tokenizer.eos_token_id
    also_named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    pad = model.config.pad_token_id if model.config.pad_token_id is not None else 0
    out = Completions.empty(seeds, max_new_tokens, temperature, pad)
    make, stop = _decoders(model), () if ignore_eos else end_tokens(named, also_named)
    order = np.argsort(lengths, kind="stable")
    together = isinstance(model, nn.Module) and sharding.is_sharded(model)
    for rows in _batches(order, batch_size, together, model.device):
        _decode(make, model.device, [prompts[row] for row in rows], rows, out, pad, stop, together)
    return out


def _batches(order: np.ndarray, size: int, together: bool, device: torch.device) -> Iterator[np.ndarray]:
    """The requests that are decoded together; with ``together``, as many batches on every process.

    Raises ValueError for fewer requests than batches: there is nothing to decode with the other processes then.
    """
    if not together:
        yield from (order[start : start + size] for start in range(0, len(order), size))
        return
    count = parallel.most(-(-len(order) // size), device)
    if len(order) < count:
        raise ValueError(f"batch_size: {size} makes {count} batches elsewhere, of {len(order)} requests here")
    yield from np.array_split(order, count)


def _decoders(model: Any) -> Callable[[int], Any]:
    """What makes the model's decoders, each with room for a number of positions: its own where it has one."""
    if hasattr(model, "decoder"):
        return model.decoder
    if fused := llama.for_decoding(model):
        return partial(fused.decoder, None)
    return partial(TransformersDecoder, model)


def _decode(
    make: Callable[[int], Any],
    device: torch.device,
    prompts: list[Sequence[int]],
    rows: np.ndarray,
    out: Completions,
    pad: int,
    eos: tuple[int, ...],
    together: bool,
) -> None:
    """Decode the requests ``rows`` into ``out``; requests that have ended leave the batch once they are half of it.

    Args:
        make: a decoder with room for a number of positions (see `TransformersDecoder`).
        together: go on until no process has requests left.
    """
    index: dict[tuple[int, ...], int] = {}
    copies = torch.tensor([index.setdefault(tuple(prompt), len(index)) for prompt in prompts], device=device)
    ids, mask = (x.to(device) for x in _left_padded(list(index), pad))
    padded = bool((mask == 0).any())
    position = mask.cumsum(1).sub_(1).clamp_(min=0)
    capacity = ids.shape[1] + out.ids.shape[1]
    decoder = make(capacity)
    active = rows
    for step in range(out.ids.shape[1]):
        logits = decoder.step(ids, mask if padded else None, position)
        if step == 0 and len(index) < len(prompts):
            decoder.keep(copies)
            logits, mask, position = logits[copies], mask[copies], position[copies]
        token, logprob = _draw(logits, out.temperature, out.seeds[active], step)
        out.ids[active, step] = np.where(out.finished[active], pad, token)
        out.logprobs[active, step] = np.where(out.finished[active], 0.0, logprob)
        out.lengths[active] += ~out.finished[active]
        out.finished[active] |= np.isin(token, eos)
        going = ~out.finished[active]
        left = int(going.sum())
        if not (parallel.most(left, device) if together else left):
            return
        if 0 < left < 0.5 * len(going):
            keep = torch.from_numpy(np.flatnonzero(going)).to(device)
            decoder.keep(keep)
            active, token, mask, position = active[going], token[going], mask[keep], position[keep]
        ids = torch.from_numpy(token)[:, None].to(device)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position[:, -1:] + 1


class TransformersDecoder:
    """Next-token logits of a transformers model, with its key-value cache."""

    def __init__(self, model: PreTrainedModel, capacity: int):
        self.model, self.cache = model, growing_cache(model, capacity)

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None, position: torch.Tensor) -> torch.Tensor:
        """Logits [request, vocabulary] after the last of ``ids`` [request, new tokens].

        Args:
            mask: int64 [request, all tokens so far], 0 for padding; None without padding.
            position: int64 [request, new tokens].
        """
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these requests only; one that is named several times becomes several."""
        self.cache.batch_select_indices(rows)


class GrowingLayer(DynamicLayer):
    """Keys and values in one block of memory that is written in place, where a DynamicLayer copies all of it each
    step."""

    def __init__(self, capacity: int, **options):
        super().__init__(**options)
        self.capacity = capacity

    def update(self, key_states, value_states, *args, **options):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            self.key_block = key_states.new_empty(shape)
            self.value_block = value_states.new_empty((*shape[:3], value_states.shape[3]))
            self.keys, self.values = self.key_block[:, :, :0], self.value_block[:, :, :0]
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.key_block[:, :, start:end] = key_states
        self.value_block[:, :, start:end] = value_states
        self.keys, self.values = self.key_block[:, :, :end], self.value_block[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end = self.keys.shape[2]
        self.key_block, self.value_block = self.key_block[indices], self.value_block[indices]
        self.keys, self.values = self.key_block[:, :, :end], self.value_block[:, :, :end]


def growing_cache(model: PreTrainedModel, capacity: int) -> Cache:
    """A key-value cache for ``capacity`` positions. Layers that are not plain (a sliding window) stay as they are."""
    cache = DynamicCache(config=model.config)
    if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [GrowingLayer(capacity) for _ in cache.layers]
    return cache


BLOCK = 256
"""Probabilities summed at a time in inverse-CDF sampling."""

CACHED_LOGITS = 2**19
"""Logits sampled from at a time on a CPU: several passes over more would each read them from memory."""


def _draw(logits: torch.Tensor, temperature: float, seeds: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-CDF sampling: int64 and float32 [request], the token and its log-probability.

    The cumulative sum is taken over blocks of tokens, then within the chosen block, so a large vocabulary is read twice
    rather than sorted or filtered.
    """
    draws = torch.from_numpy(uniforms(seeds, step)).to(logits.device)
    rows = max(1, CACHED_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    parts = [_draw_rows(*part, temperature) for part in zip(logits.split(rows), draws.split(rows), strict=True)]
    token, logprob = (torch.cat(part) for part in zip(*parts, strict=True))
    return token.cpu().numpy(), logprob.cpu().numpy()


def _draw_rows(logits: torch.Tensor, draws: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 and float32 [request] of logits [request, vocabulary] and float64 draws in [0, 1)."""
    top = logits.amax(-1, keepdim=True)
    weight = logits.to(torch.float32, copy=True).sub_(top).div_(temperature or 1.0).exp_()
    size = min(BLOCK, weight.shape[1])
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % size)).view(len(weight), -1, size)
    cumulative = blocks.sum(2).double().cumsum(1)
    token = _inverse_cdf(blocks, cumulative, draws) if temperature else logits.argmax(-1, keepdim=True)
    logprob = (logits.gather(1, token).float() - top) / (temperature or 1.0) - cumulative[:, -1:].log().float()
    return token.squeeze(1), logprob.squeeze(1)


def _inverse_cdf(blocks: torch.Tensor, cumulative: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """int64 [request, 1]: the first token at which the cumulative weight exceeds the draw's share of all of it.

    Args:
        blocks: float32 [request, block, token of the block], weights.
        cumulative: float64 [request, block], their sums up to the end of each block.
        draws: float64 [request], in [0, 1).
    """
    target = draws[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    within = blocks[torch.arange(len(blocks), device=block.device), block[:, 0]].double().cumsum(1)
    # a draw in the rounding gap between a block's sum and its last partial sum takes the block's last likely token
    last = within.shape[1] - 1 - (within == within[:, -1:]).sum(1, keepdim=True) + 1
    token = torch.minimum(torch.searchsorted(within, target - before, right=True), last)
    return block * blocks.shape[2] + token


def _left_padded(prompts: list[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = np.full((len(prompts), longest), pad_id), np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)
