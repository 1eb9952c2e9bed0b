"""The metrics of an update, with their units.

| metric | meaning | unit |
|---|---|---|
| proxy | mean reward of a response, less the penalties for a missing end and for length | score |
| proxy_std | standard deviation of the reward over the update's responses | score |
| kl_nats | KL(policy || reference), k1, summed over a response, mean over responses | nats |
| kl_coefficient | beta, the price of a nat | score / nat |
| response_tokens | mean length of a response, end-of-sequence included | tokens |
| finished | share of responses that ended by end-of-sequence | share |
| entropy_nats | entropy of the next token, mean over response tokens and steps | nats |
| sampler_gap_nats | largest difference between the sampler's and the trainer's log-probability of a token | nats |
| sampler_gap_mean_nats | mean absolute value of that difference, over response tokens | nats |
| sampler_ratio | exp(trainer's - sampler's log-probability), mean over response tokens | - |
| ratio_kl_nats | KL(policy that sampled || policy being trained), k1, mean over tokens and steps | nats |
| clip_fraction | share of tokens (RLOO: responses) at which the clipped branch is active, mean over steps | share |
| policy_loss | the algorithm's policy loss, mean over steps | - |
| policy_grad_norm | norm of the policy's gradient before clipping, mean over steps | - |
| value_loss | critic's clipped squared error / 2, mean over steps (PPO) | score^2 |
| critic_grad_norm | norm of the critic's gradient before clipping, mean over steps (PPO) | - |
| explained_variance | 1 - Var(R - V) / Var(R) of the returns by the critic's values at sampling (PPO) | share |
| replaced_groups | groups replaced by dynamic sampling, where it is on | groups |
| steps | optimiser steps taken; fewer than planned where the update stopped early | - |
"""

import numpy as np
import torch

from rlhfscale.rl.kl import sequence_kl
from rlhfscale.rl.rollout import Rollouts


def rollout_metrics(rollouts: Rollouts, steps: list[dict[str, float]], kl_coefficient: float) -> dict[str, float]:
    """The metrics of an update from its roll-outs and the records of its optimiser steps."""
    kl = sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask)
    gaps = rollouts.sampler_gaps
    return {
        "proxy": rollouts.scores.mean().item(),
        "proxy_std": rollouts.scores.std(correction=0).item(),
        "kl_nats": kl.mean().item(),
        "kl_coefficient": kl_coefficient,
        "response_tokens": rollouts.mask.sum(1).float().mean().item(),
        "finished": rollouts.finished.float().mean().item(),
        "sampler_gap_nats": rollouts.sampler_gap,
        "sampler_gap_mean_nats": gaps.abs().mean().item(),
        "sampler_ratio": gaps.exp().mean().item(),
        **{name: float(np.mean([step[name] for step in steps])) for name in steps[0]},
        "steps": len(steps),
    }


def explained_variance(rollouts: Rollouts) -> float:
    """``1 - Var(R - V) / Var(R)`` over response tokens: 1 for a perfect critic, 0 for one that knows nothing."""
    returns, values = rollouts.returns[rollouts.mask], rollouts.values[rollouts.mask]
    variance = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / variance.clamp(min=1e-8)).item() if variance > 0 else 0.0


def summed(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """The record of a step: the terms of its passes, which are weighted sums, added up."""
    return {name: float(sum(part[name].detach() for part in parts)) for name in parts[0]}
