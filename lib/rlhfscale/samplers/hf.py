"""The in-process sampler: a batched decoding loop over a transformers model with its key-value cache."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from rlhfscale.samplers.base import Completions, uniforms


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: np.ndarray,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 1024,
) -> Completions:
    """Sample one response for each prompt.

    Args:
        model: a causal language model in evaluation mode; its config names the pad and end-of-sequence tokens.
        prompts: token ids of each prompt. For several responses to a prompt, repeat it.
        seeds: uint64 [prompt], one for each request; equal seeds and prompts give equal responses.
        max_new_tokens: responses are cut there.
        temperature: 0 is greedy.
        batch_size: requests decoded together, of similar prompt length.

    Raises:
        ValueError: an empty prompt, a prompt that does not fit into the context, or not one seed for each prompt.
    """
    lengths = np.fromiter(map(len, prompts), np.int64, len(prompts))
    _check(model, lengths, seeds, max_new_tokens, temperature)
    out = Completions(
        ids=np.full((len(prompts), max_new_tokens), model.config.pad_token_id, np.int32),
        lengths=np.zeros(len(prompts), np.int64),
        finished=np.zeros(len(prompts), bool),
        logprobs=np.zeros((len(prompts), max_new_tokens), np.float32),
        temperature=temperature,
        seeds=seeds,
    )
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        _decode(model, prompts, order[start : start + batch_size], out)
    return out


def _decode(model: PreTrainedModel, prompts: Sequence[Sequence[int]], rows: np.ndarray, out: Completions) -> None:
    """Decode the requests ``rows`` into ``out``; requests that have ended leave the batch once they are half of it."""
    ids, mask = _left_padded([prompts[row] for row in rows], model.config.pad_token_id)
    position = mask.cumsum(1).sub_(1).clamp_(min=0)
    cache = DynamicCache(config=model.config)
    active = rows
    for step in range(out.ids.shape[1]):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1
        )
        token, logprob = _draw(output.logits[:, -1].float(), out.temperature, out.seeds[active], step)
        out.ids[active, step] = np.where(out.finished[active], model.config.pad_token_id, token)
        out.logprobs[active, step] = np.where(out.finished[active], 0.0, logprob)
        out.lengths[active] += ~out.finished[active]
        out.finished[active] |= token == model.config.eos_token_id
        going = ~out.finished[active]
        if not going.any():
            return
        if going.mean() < 0.5:
            keep = torch.from_numpy(np.flatnonzero(going))
            cache.batch_select_indices(keep)
            active, token, mask, position = active[going], token[going], mask[keep], position[keep]
        ids = torch.from_numpy(token)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position[:, -1:] + 1


def _draw(logits: torch.Tensor, temperature: float, seeds: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Inverse-CDF sampling: int64 and float32 [request], the token and its log-probability."""
    logprobs = torch.log_softmax(logits / temperature if temperature else logits, dim=-1)
    if temperature:
        cumulative = logprobs.double().exp().cumsum(-1)
        threshold = torch.from_numpy(uniforms(seeds, step))[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    else:
        token = logprobs.argmax(-1, keepdim=True)
    return token.squeeze(1).numpy(), logprobs.gather(1, token).squeeze(1).numpy()


def _left_padded(prompts: list[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _check(model, lengths: np.ndarray, seeds: np.ndarray, max_new_tokens: int, temperature: float) -> None:
    if len(lengths) == 0:
        raise ValueError("prompts: none given")
    if lengths.min() == 0:
        raise ValueError(f"prompts[{int(lengths.argmin())}] is empty; give at least the begin-of-sequence token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is not at least 1")
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature: {temperature} is not a finite number of at least 0; 0 is greedy")
    context = model.config.max_position_embeddings
    if lengths.max() + max_new_tokens > context:
        worst = int(lengths.argmax())
        raise ValueError(
            f"prompts[{worst}] has {lengths[worst]} tokens; with max_new_tokens={max_new_tokens} it exceeds the"
            f" model's context of {context}"
        )
    if seeds.shape != lengths.shape or seeds.dtype != np.uint64:
        raise ValueError(f"seeds: need uint64 [{len(lengths)}], got {seeds.dtype} {list(seeds.shape)}")
