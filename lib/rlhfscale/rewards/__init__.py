"""Rewards: reward models, combinations of them, and the interface that trainers and samplers ask for."""

from rlhfscale.rewards.base import Ensemble, Mixed, Normalised, Reward, Shrunk, TextReward, as_reward, checked
from rlhfscale.rewards.labelled import Labelled, StepLabelled
from rlhfscale.rewards.outcome import OutcomeRewardModel
from rlhfscale.rewards.process import ProcessRewardModel
from rlhfscale.rewards.shared import SharedReward

__all__ = [
    "Ensemble",
    "Labelled",
    "Mixed",
    "Normalised",
    "OutcomeRewardModel",
    "ProcessRewardModel",
    "Reward",
    "SharedReward",
    "Shrunk",
    "StepLabelled",
    "TextReward",
    "as_reward",
    "checked",
]
