"""Reinforcement learning from rewards: PPO with a critic, GRPO and RLOO, with LoRA, QLoRA or all weights."""

from rlhfscale.rl.config import GRPOConfig, PPOConfig, RLOOConfig
from rlhfscale.rl.grpo import GRPO
from rlhfscale.rl.ppo import PPO
from rlhfscale.rl.rloo import RLOO

TRAINERS = {"ppo": (PPO, PPOConfig), "grpo": (GRPO, GRPOConfig), "rloo": (RLOO, RLOOConfig)}
"""By algorithm, the trainer and the type of its hyper-parameters."""

__all__ = ["GRPO", "PPO", "RLOO", "TRAINERS", "GRPOConfig", "PPOConfig", "RLOOConfig"]
