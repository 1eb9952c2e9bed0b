"""PPO's losses (Schulman et al. 2017). All tensors are float32 [batch, response]; ``mask`` is bool, response tokens."""

import torch

from rlhfscale.rl.advantages import masked_mean


def clipped_surrogate(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy loss ``-E[min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)]`` (eq. 7), a mean over response tokens.

    Returns:
        the loss, and the fraction of response tokens at which the clipped branch is the smaller one.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(surrogate, clipped), mask)
    return loss, masked_mean((clipped < surrogate).float(), mask)


def clipped_value(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """``E[max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)] / 2``, a mean over response tokens."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns).square(), (clipped - returns).square())
    return masked_mean(error, mask) / 2
