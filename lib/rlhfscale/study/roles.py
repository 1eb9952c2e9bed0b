"""The specs of each role in the study, on the ladder trained from scratch and on that of published checkpoints."""

from rlhfscale.bed import specs
from rlhfscale.chat import specs as chat_specs

RewardModel = specs.RewardModel | chat_specs.AnswerReward
Policy = specs.Policy | chat_specs.Aligned
Samples = specs.Samples | chat_specs.Answers
Scores = specs.Scores | chat_specs.AnswerScores
