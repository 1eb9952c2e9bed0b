"""Rewards: reward models, their training, and combinations of rewards, all behind one method ``score(sequences)``.

    data = Labelled.from_pairs([("Name a prime.", "7", "8")], tokenizer)
    options = {"epochs": 2, "prompts_per_batch": 16, "lr": 1e-4, "lora_rank": 16, "readout": "last", "seed": (0,)}
    model, records = outcome.train(loading.load_scorer(folder, init_seed=0), [data], **options)
    reward = OutcomeRewardModel(model, tokenizer)
    scores = reward.score(data.sequences)

The files:

    base.py      what a reward is; mixtures, ensembles, normalisation and shrinking of rewards
    pooled.py    rewards that take time: calls of single responses, several at once, with a time limit
    conversations.py  a conversation in a reward model's own tokens
    formats.py   labelled data in TRL's formats, from datasets, JSONL or Parquet
    labelled.py  responses with labels: comparisons, correctness, right or wrong steps
    scorer.py    reading, saving and loading a model with a score head
    losses.py    the losses, from scores and labels
    training.py  the training run that the three kinds of reward model share
    outcome.py   the outcome reward model: one score for a whole response
    process.py   the process reward model: one probability for each step
    mixed.py     an outcome reward model from all three kinds of label
    shared.py    a reward model as an adapter on the policy's own base
    metrics.py   how well scores order responses
"""

from rlhfscale.rewards.base import Ensemble, Mixed, Normalised, Reward, Shrunk, TextReward, as_reward, checked
from rlhfscale.rewards.labelled import Labelled, StepLabelled
from rlhfscale.rewards.outcome import OutcomeRewardModel
from rlhfscale.rewards.pooled import Pooled, RewardFailed
from rlhfscale.rewards.process import ProcessRewardModel
from rlhfscale.rewards.shared import SharedReward

__all__ = [
    "Ensemble",
    "Labelled",
    "Mixed",
    "Normalised",
    "OutcomeRewardModel",
    "Pooled",
    "ProcessRewardModel",
    "Reward",
    "RewardFailed",
    "SharedReward",
    "Shrunk",
    "StepLabelled",
    "TextReward",
    "as_reward",
    "checked",
]
