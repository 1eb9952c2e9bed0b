"""Reinforcement learning from rewards: PPO with a critic, GRPO and RLOO, on any transformers causal language model.

    def reward(prompts, responses):
        return [float("7" in response) for response in responses]

    trainer = PPO(model, tokenizer, reward, PPOConfig(prompts_per_update=64), seed=0)
    metrics = trainer.train(prompts, num_updates=100, folder="runs/ppo")

The files, in the order in which an update uses them:

    config.py      hyper-parameters that the algorithms share
    networks.py    policy, reference and critic as adapters on one frozen base, or with all weights trained
    loop.py        one update: what the algorithms do alike
    outer.py       the outer loop: update after update, saving and resuming
    prompts.py     the order of a collection of prompts
    dynamic.py     other prompts in place of those that teach nothing
    rollout.py     sampled responses and what is known of each of their tokens
    logprobs.py    log-probabilities and entropies of response tokens
    kl.py          estimators of the divergence from the reference, and the adaptive KL coefficient
    advantages.py  GAE, group-relative and leave-one-out advantages
    losses.py      clipped losses of policy and critic
    learner.py     AdamW with clipped gradients, and checkpoints
    metrics.py     the metrics of an update, with their units
    logs.py        what is written beside checkpoints: metrics, tables of completions, loggers
    ppo.py, grpo.py, rloo.py   each algorithm's own hyper-parameters, advantages and loss
"""

from rlhfscale.rl.grpo import GRPO, GRPOConfig
from rlhfscale.rl.ppo import PPO, PPOConfig
from rlhfscale.rl.rloo import RLOO, RLOOConfig

TRAINERS = {"ppo": (PPO, PPOConfig), "grpo": (GRPO, GRPOConfig), "rloo": (RLOO, RLOOConfig)}
"""The trainer of each algorithm, and the type of its hyper-parameters."""

__all__ = ["GRPO", "PPO", "RLOO", "TRAINERS", "GRPOConfig", "PPOConfig", "RLOOConfig"]
