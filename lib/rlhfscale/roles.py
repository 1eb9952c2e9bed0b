"""The specs of each role in the study, on the ladder trained from scratch and on that of published checkpoints."""

from rlhfscale import language, specs

RewardModel = specs.RewardModel | language.AnswerReward
Policy = specs.Policy | language.Aligned
Samples = specs.Samples | language.Answers
Scores = specs.Scores | language.AnswerScores
