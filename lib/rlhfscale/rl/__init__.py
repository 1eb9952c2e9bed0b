"""Reinforcement learning from learned rewards."""

from rlhfscale.rl.ppo import PPO, PPOConfig

__all__ = ["PPO", "PPOConfig"]
