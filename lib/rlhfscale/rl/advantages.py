"""Advantages from rewards. All tensors are float32 [batch, response], ``mask`` is bool and marks response tokens."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with ``V = A = 0`` past the last
    response token; ``values[:, t]`` is V of the state in which token t is chosen.

    Returns:
        advantages, and returns ``A + V``; both 0 outside the mask.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = (delta + gamma * lam * advantage) * mask[:, t]
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the marked tokens of the whole batch."""
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the marked tokens; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask
