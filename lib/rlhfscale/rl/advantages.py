"""Advantages from rewards. Tensors over tokens are float32 [batch, response]; ``mask`` marks the response tokens."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with ``V = A = 0`` past the last
    response token; ``values[:, t]`` is V of the state in which token t is chosen.

    Returns:
        advantages, and returns ``A + V``; both are 0 outside the mask.
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


def group_relative(rewards: torch.Tensor, group_size: int, *, scale: bool | str = True) -> torch.Tensor:
    """``A_i = r_i - mean of the group``, divided by the group's standard deviation if ``scale`` (Shao et al. 2024,
    section 4.1.2).

    Args:
        rewards: float32 [batch]; the responses to one prompt stand in a row.
        group_size: number of responses to each prompt, at least 2.
        scale: "batch" divides by the standard deviation of the whole batch (Liu et al. 2025, Lite PPO, section 3.1).

    Returns:
        float32 [batch].

    Raises:
        ValueError: a group of one, or a batch that does not consist of whole groups.
    """
    groups = _groups(rewards, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale:
        spread = rewards.std() if scale == "batch" else groups.std(1, keepdim=True)
        advantages = advantages / (spread + 1e-4)
    return advantages.flatten()


def leave_one_out(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """``A_i = r_i - mean of the group's other rewards`` (Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

    Arguments, result and errors are those of `group_relative`.
    """
    groups = _groups(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten()


def _groups(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    if group_size < 2:
        raise ValueError(f"group_size: {group_size} leaves a response nothing to be compared with; take at least 2")
    if len(rewards) % group_size:
        raise ValueError(f"rewards: {len(rewards)} are not whole groups of {group_size}")
    return rewards.view(-1, group_size)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the marked tokens of the whole batch, a scalar; 0 where none is marked."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the marked tokens; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask
