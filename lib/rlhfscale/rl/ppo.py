"""Proximal policy optimisation of a LoRA policy with a LoRA critic on one shared, frozen base.

One update, top to bottom: sample; score; KL-penalised rewards; advantages; a few epochs of clipped losses. The
reference policy is the base with its adapters off (Schulman et al. 2017; Stiennon et al. 2020 for the KL penalty).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from rlhfscale import lm, models
from rlhfscale.rl.advantages import gae, masked_mean, whiten
from rlhfscale.rl.kl import sequence_kl
from rlhfscale.rl.losses import clipped_surrogate, clipped_value
from rlhfscale.rl.rollout import RewardFunction, Rollouts, collect, token_logprobs, token_rewards, token_values
from rlhfscale.samplers.base import Completions, request_seeds


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters of a run.

    Attributes:
        num_updates: updates, each on fresh roll-outs.
        prompts_per_update: prompts sampled in an update.
        responses_per_prompt: responses sampled to each of them.
        epochs: passes over an update's roll-outs.
        minibatch_size: roll-outs in an optimiser step; divides the number of roll-outs.
        policy_lr, critic_lr: AdamW's learning rates; constant after a warm-up of five updates.
        kl_coefficient: beta, in units of normalised score for each nat.
        clip, value_clip: half-widths of the clipping ranges.
        gamma, lam: discount and lambda of GAE.
        temperature: of sampling, and of every log-probability.
        max_grad_norm: gradients of policy and of critic are each clipped to it.
        missing_eos_penalty: subtracted from the score of a response that never ended.
        lora_rank, lora_alpha: of both adapters.
        max_new_tokens: responses are cut there.
    """

    num_updates: int
    prompts_per_update: int
    responses_per_prompt: int
    epochs: int
    minibatch_size: int
    policy_lr: float
    critic_lr: float
    kl_coefficient: float
    clip: float
    value_clip: float
    gamma: float
    lam: float
    temperature: float
    max_grad_norm: float
    missing_eos_penalty: float
    lora_rank: int
    lora_alpha: float
    max_new_tokens: int


class PPO:
    """A PPO run over prompts with any reward function.

    Args:
        base: causal language model, frozen in place and given the adapters.
        reward: scores whole sequences, see `RewardFunction`.
        config: hyper-parameters.
        seed: decides adapters, sampling and the order of minibatches.
    """

    def __init__(self, base: nn.Module, reward: RewardFunction, config: PPOConfig, seed: int):
        self.config, self.reward, self.seed = config, reward, seed
        self.shared = models.SharedBase(base, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)
        self.policy_parameters = self.shared.parameters_of(models.POLICY)
        self.critic_parameters = self.shared.parameters_of(models.CRITIC)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.policy_parameters, "lr": config.policy_lr},
                {"params": self.critic_parameters, "lr": config.critic_lr},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._rates = (config.policy_lr, config.critic_lr)
        self._rng = np.random.default_rng((seed, 0))
        self.num_updates_done = 0

    def update(self, prompts: list[list[int]]) -> tuple[dict[str, float], Completions]:
        """One update on fresh roll-outs.

        Args:
            prompts: token ids of ``prompts_per_update`` prompts.

        Returns:
            the update's metrics (see ``metrics`` below), and the responses, prompt by prompt.

        Raises:
            lm.Diverged: a loss or a gradient is not finite.
        """
        config = self.config
        repeated = [prompt for prompt in prompts for _ in range(config.responses_per_prompt)]
        rollouts, completions = collect(
            self.shared,
            self.reward,
            repeated,
            request_seeds((self.seed, 1, self.num_updates_done), len(repeated)),
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            missing_eos_penalty=config.missing_eos_penalty,
        )
        rewards = token_rewards(rollouts, config.kl_coefficient)
        advantages, returns = gae(rewards, rollouts.values, rollouts.mask, gamma=config.gamma, lam=config.lam)
        advantages = whiten(advantages, rollouts.mask)
        self._set_learning_rates()
        steps = [self._step(rollouts, advantages, returns, index) for index in self._minibatches(len(rollouts))]
        self.num_updates_done += 1
        return metrics(rollouts, returns, steps), completions

    def _minibatches(self, num_rollouts: int) -> Iterator[torch.Tensor]:
        for _ in range(self.config.epochs):
            order = torch.from_numpy(self._rng.permutation(num_rollouts))
            yield from order.split(self.config.minibatch_size)

    def _step(
        self, rollouts: Rollouts, advantages: torch.Tensor, returns: torch.Tensor, index: torch.Tensor
    ) -> dict[str, float]:
        """One optimiser step of policy and critic on a minibatch."""
        config, batch = self.config, rollouts[index]
        width = batch.mask.shape[1]
        self.optimizer.zero_grad(set_to_none=True)

        self.shared.use(models.POLICY)
        logprobs, entropy = token_logprobs(self.shared, batch, config.temperature)
        policy_loss, clip_fraction = clipped_surrogate(
            logprobs, batch.logprobs, advantages[index, :width], batch.mask, config.clip
        )
        policy_loss.backward()

        self.shared.use(models.CRITIC)
        values = token_values(self.shared, batch)
        value_loss = clipped_value(values, batch.values, returns[index, :width], batch.mask, config.value_clip)
        value_loss.backward()

        policy_norm = nn.utils.clip_grad_norm_(self.policy_parameters, config.max_grad_norm)
        critic_norm = nn.utils.clip_grad_norm_(self.critic_parameters, config.max_grad_norm)
        if not torch.isfinite(policy_loss + value_loss + policy_norm + critic_norm):
            raise lm.Diverged(
                f"update {self.num_updates_done}: policy loss {policy_loss.item()}, value loss {value_loss.item()},"
                f" gradient norms {policy_norm.item()} and {critic_norm.item()}"
            )
        self.optimizer.step()
        return {
            "policy_loss": policy_loss.item(),
            "value_loss": value_loss.item(),
            "clip_fraction": clip_fraction.item(),
            "entropy_nats": masked_mean(entropy, batch.mask).item(),
            "ratio_kl_nats": masked_mean(batch.logprobs - logprobs, batch.mask).item(),
            "policy_grad_norm": policy_norm.item(),
        }

    def _set_learning_rates(self) -> None:
        factor = min(1.0, (self.num_updates_done + 1) / 5)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate


def metrics(rollouts: Rollouts, returns: torch.Tensor, steps: list[dict[str, float]]) -> dict[str, float]:
    """What is logged of an update.

    proxy: mean score. kl_nats: KL(policy || reference), k1, summed over a response, mean over responses.
    response_tokens: mean length. finished: share ended by end-of-sequence. explained_variance: of the returns by the
    critic's values, ``1 - Var(R - V) / Var(R)``. sampler_gap: see `Rollouts`. The others are means over the update's
    optimiser steps: policy_loss, value_loss, clip_fraction, entropy_nats (of a token), ratio_kl_nats (k1 between the
    policy that sampled and the one being trained), policy_grad_norm (before clipping).
    """
    residual = (returns - rollouts.values)[rollouts.mask]
    variance = returns[rollouts.mask].var()
    kl = sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask)
    return {
        "proxy": rollouts.scores.mean().item(),
        "kl_nats": kl.mean().item(),
        "response_tokens": rollouts.mask.sum(1).float().mean().item(),
        "finished": rollouts.finished.float().mean().item(),
        "explained_variance": (1 - residual.var() / variance.clamp(min=1e-8)).item(),
        "sampler_gap": rollouts.sampler_gap,
        **{name: float(np.mean([step[name] for step in steps])) for name in steps[0]},
    }
