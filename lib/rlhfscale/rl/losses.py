"""The losses of policy and critic, one number for each element. Weights that sum to 1 say how they are averaged.

The loss of a minibatch is therefore the sum of the losses of its parts, however it is split into passes.
"""

import torch


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)`` (Schulman et al. 2017, eq. 7).

    Args:
        ratio: float32 [...], probability under the policy divided by that under the policy that sampled.
        advantages: float32 [...].
        clip: epsilon, the half-width of the clipping range.

    Returns:
        float32 [...], the loss of each element; and bool [...], whether the clipped branch is the smaller one.
    """
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(surrogate, clipped), clipped < surrogate


def clipped_value(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each element, float32 [...].

    The clipping is that of PPO's published code; Schulman et al. 2017 do not clip values.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def token_weights(mask: torch.Tensor, scheme: str = "token", max_new_tokens: int | None = None) -> torch.Tensor:
    """How much each response token counts in the loss of a step, float32 [batch, response].

    Args:
        mask: bool [batch, response].
        scheme: "token", all tokens count alike: ``1 / tokens``; "sequence", all responses count alike: ``1 / (batch
            length)``; "constant": ``1 / (batch max_new_tokens)``.
        max_new_tokens: needed by "constant".

    Raises:
        ValueError: an unknown scheme.
    """
    weights = mask.float()
    if scheme == "token":
        return weights / weights.sum()
    if scheme == "sequence":
        return weights / (weights.sum(1, keepdim=True) * len(mask))
    if scheme == "constant":
        return weights / (len(mask) * max_new_tokens)
    raise ValueError(f"scheme: {scheme!r} is not one of token, sequence, constant")
