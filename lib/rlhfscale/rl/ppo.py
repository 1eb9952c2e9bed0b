"""Proximal policy optimisation with a critic (Schulman et al. 2017), with a KL penalty as in Stiennon et al. 2020.

`loop.Trainer.update` samples responses, scores them, and evaluates them under policy, reference and critic. Two things
are PPO's own. `PPO.estimate_advantages` subtracts the KL penalty from the rewards and estimates advantages with the
critic (GAE). `PPO.loss` is the clipped loss of policy and critic, on which each minibatch takes one step.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from rlhfscale.models.loading import CRITIC
from rlhfscale.rl.advantages import gae, whiten
from rlhfscale.rl.config import Config
from rlhfscale.rl.kl import kl_terms
from rlhfscale.rl.loop import Trainer
from rlhfscale.rl.losses import clipped_surrogate, clipped_value, token_weights
from rlhfscale.rl.rollout import Evaluation, Rollouts, token_rewards


class PPOConfig(Config):
    """Hyper-parameters of PPO, beside those of `Config`.

    Attributes:
        critic: "trunk" reads values by a head on the policy's own trunk, so that one pass serves both; "separate" gives
            the critic an adapter of its own (with adapter "none", a copy of the trunk).
        critic_lr: AdamW's learning rate for the value head, and for a separate critic.
        value_clip: half-width of the clipping range of the values.
        value_coefficient: weight of the value loss where the trunk is shared.
        gamma, lam: discount and lambda of GAE.
        kl_estimator: estimator of the KL penalty at each token, see `kl`.
        whiten_rewards: divide the scores of an update by their standard deviation.
    """

    critic: Literal["trunk", "separate"] = "trunk"
    critic_lr: float = Field(1e-3, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coefficient: float = Field(0.1, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    whiten_rewards: bool = False

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates of policy and critic."""
        return super().learning_rates | {CRITIC: self.critic_lr}


class PPO(Trainer):
    """A PPO run of any causal language model with any reward; arguments and errors as in `loop.Trainer`."""

    algorithm, config_type = "ppo", PPOConfig

    def estimate_advantages(self, rollouts: Rollouts) -> Rollouts:
        """Rewards of tokens, then advantages by GAE, whitened over response tokens, and returns."""
        config, scores = self.config, rollouts.scores
        if config.whiten_rewards:
            spread = scores.std(correction=min(1, len(scores) - 1))
            scores = scores / spread if spread > 1e-4 else scores
        kl = kl_terms(rollouts.logprobs, rollouts.ref_logprobs, config.kl_estimator)
        rewards = token_rewards(rollouts, scores, kl, self.kl_coefficient)
        advantages, returns = gae(rewards, rollouts.values, rollouts.mask, gamma=config.gamma, lam=config.lam)
        return replace(rollouts, advantages=whiten(advantages, rollouts.learnt(config.mask_truncated)), returns=returns)

    def step(self, rollouts: Rollouts, index: torch.Tensor, evaluated: Evaluation | None = None) -> dict[str, float]:
        """One optimiser step of policy and critic; all response tokens count alike. See `Trainer.descend`."""
        batch = rollouts[index]
        return self.descend(replace(batch, weights=token_weights(batch.learnt(self.config.mask_truncated))), evaluated)

    def loss(self, batch: Rollouts, now: Evaluation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, and its terms: sums over tokens, weighted by ``batch.weights``.

        ``-min(ratio A, clip(ratio) A) + c max((V - R)^2, (clip(V) - R)^2) / 2 - entropy bonus`` (Schulman et al. 2017,
        eq. 9, with clipped values).
        """
        config = self.config
        ratio = torch.exp(now.logprobs - batch.logprobs)
        bounds = (config.clip, config.clip_high, config.max_ratio)
        policy_loss, clipped = clipped_surrogate(ratio, batch.advantages, *bounds)
        value_loss = clipped_value(now.values, batch.values, batch.returns, config.value_clip)
        terms = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_nats": now.entropy,
            "clip_fraction": clipped,
            "ratio_kl_nats": batch.logprobs - now.logprobs,
        }
        terms = {name: (batch.weights * term).sum() for name, term in terms.items()}
        # a critic with a trunk of its own has its own learning rate: there the coefficient would only scale gradients
        value_coefficient = config.value_coefficient if config.critic == "trunk" else 1.0
        loss = terms["policy_loss"] + value_coefficient * terms["value_loss"]
        return loss - config.entropy_coefficient * terms["entropy_nats"], terms
