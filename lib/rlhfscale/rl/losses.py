"""The losses of policy and critic, one number for each element. Weights that sum to 1 say how they are averaged.

The loss of a minibatch is therefore the sum of the losses of its parts, however it is split into passes.
"""

import torch


def clipped_surrogate(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip: float,
    clip_high: float | None = None,
    max_ratio: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)`` (Schulman et al. 2017, eq. 7).

    Args:
        ratio: float32 [...], probability under the policy divided by that under the policy that sampled.
        advantages: float32 [...].
        clip: epsilon, the half-width of the clipping range.
        clip_high: another width above 1 (Yu et al. 2025, DAPO, eq. 8).
        max_ratio: bound of the ratio also where A is negative, so that no token's loss grows without bound (Ye et al.
            2020, dual-clip PPO, eq. 8).

    Returns:
        float32 [...], the loss of each element; and bool [...], whether the clipped branch is the smaller one.
    """
    bounded = ratio if max_ratio is None else ratio.clamp(max=max_ratio)
    surrogate = bounded * advantages
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantages
    return -torch.minimum(surrogate, clipped), clipped < surrogate


def clipped_weight(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-sg(min(ratio, 1 + clip_high)) A log pi``: CISPO, REINFORCE with a bounded importance weight (MiniMax-M1 2025,
    eq. 4, without a lower bound). Unlike with clipping, every token keeps a gradient.

    Arguments and result as of `clipped_surrogate`; ``logprobs`` are the policy's, float32 [...].
    """
    weight = ratio.detach().clamp(max=1 + clip_high)
    return -weight * advantages * logprobs, ratio > 1 + clip_high


def sequence_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The ratio of whole responses, normalised by length, at each of their tokens (Zheng et al. 2025, GSPO, eq. 7).

    Args:
        log_ratio: float32 [batch, response], log-ratio of each token.
        mask: bool [batch, response].
    """
    mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return torch.exp(mean).expand_as(log_ratio)


def sampler_weights(gaps: torch.Tensor, mask: torch.Tensor, *, level: str, kind: str, max_ratio: float) -> torch.Tensor:
    """Importance weights of responses that were sampled by another engine than the trainer, float32 [batch, response].

    Args:
        gaps: float32 [batch, response], the trainer's log-probability of each token less the sampler's.
        mask: bool [batch, response].
        level: the ratio of each "token", or of the whole "sequence", the same at its tokens.
        kind: "truncate" bounds weights by ``max_ratio`` (Yao et al. 2025, TIS); "mask" sets larger ones to 0 (Liu et
            al. 2025, MIS).
        max_ratio: the bound, at least 1.
    """
    gaps = gaps * mask
    ratio = torch.exp(gaps if level == "token" else gaps.sum(1, keepdim=True).expand_as(gaps))
    return ratio.clamp(max=max_ratio) if kind == "truncate" else ratio.masked_fill(ratio > max_ratio, 0.0)


def clipped_value(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each element, float32 [...].

    The clipping is that of PPO's published code; Schulman et al. 2017 do not clip values.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def token_weights(mask: torch.Tensor, scheme: str = "token", max_new_tokens: int | None = None) -> torch.Tensor:
    """How much each response token counts in the loss of a step, float32 [batch, response].

    Args:
        mask: bool [batch, response], the tokens that are learnt from.
        scheme: "token", all tokens count alike: ``1 / tokens``; "sequence", all responses count alike: ``1 / (responses
            length)``; "constant": ``1 / (responses max_new_tokens)``. Responses are those with a marked token.
        max_new_tokens: needed by "constant".

    Raises:
        ValueError: an unknown scheme.
    """
    weights = mask.float()
    responses = mask.any(1).sum().clamp(min=1)  # a response without a marked token is no part of the mean either
    if scheme == "token":
        return weights / weights.sum().clamp(min=1)
    if scheme == "sequence":
        return weights / (weights.sum(1, keepdim=True).clamp(min=1) * responses)
    if scheme == "constant":
        return weights / (responses * max_new_tokens)
    raise ValueError(f"scheme: {scheme!r} is not one of token, sequence, constant")
