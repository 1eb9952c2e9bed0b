"""The trainers' losses, element by element: what they are averaged over is said by weights that sum to 1.

So the loss of a minibatch is the sum of its parts' losses, however it is split into passes.
"""

import torch


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``-min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)`` (Schulman et al. 2017, eq. 7).

    Args:
        ratio: float32 [...], probability under the policy over probability under the one that sampled.
        advantages: float32 [...].

    Returns:
        the loss of each element, and bool, whether the clipped branch is the smaller one.
    """
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(surrogate, clipped), clipped < surrogate


def clipped_value(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float) -> torch.Tensor:
    """``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each element."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def token_weights(mask: torch.Tensor, scheme: str = "token", max_new_tokens: int | None = None) -> torch.Tensor:
    """float32 [batch, response]: how much each response token counts in a step's loss.

    Args:
        mask: bool [batch, response].
        scheme: "token", all alike: ``1 / tokens``; "sequence", all responses alike: ``1 / (batch length)``; "constant":
            ``1 / (batch max_new_tokens)``.
    """
    weights = mask.float()
    if scheme == "token":
        return weights / weights.sum()
    if scheme == "sequence":
        return weights / (weights.sum(1, keepdim=True) * len(mask))
    if scheme == "constant":
        return weights / (len(mask) * max_new_tokens)
    raise ValueError(f"scheme: {scheme!r} is not one of token, sequence, constant")
