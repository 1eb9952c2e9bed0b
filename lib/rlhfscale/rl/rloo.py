"""REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024): a whole response is one action.

The score of a response, less the divergence from the reference, is compared with the mean of the other responses to the
same prompt. The probability ratio is that of the whole response, and is clipped as in PPO, so that several epochs are
possible. The rest of an update is `loop.Trainer.update`.
"""

from dataclasses import replace
from typing import Literal

import torch

from rlhfscale.rl.advantages import leave_one_out
from rlhfscale.rl.config import GroupedConfig
from rlhfscale.rl.kl import sequence_kl
from rlhfscale.rl.loop import Trainer
from rlhfscale.rl.losses import clipped_surrogate
from rlhfscale.rl.rollout import Evaluation, Rollouts


class RLOOConfig(GroupedConfig):
    """Hyper-parameters of RLOO: those of `Config`. The KL penalty is part of the reward."""

    sampler_correction_level: Literal["sequence"] = "sequence"  # a whole response is one action


class RLOO(Trainer):
    """An RLOO run of any causal language model with any reward; arguments and errors as in `loop.Trainer`."""

    algorithm, config_type = "rloo", RLOOConfig

    def estimate_advantages(self, rollouts: Rollouts) -> Rollouts:
        """Advantages of score less KL penalty within each prompt's group, the same at every token of a response."""
        kl = sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask)
        rewards = rollouts.scores - self.kl_coefficient * kl
        advantages = leave_one_out(rewards, self.config.responses_per_prompt)
        return replace(rollouts, advantages=advantages[:, None] * rollouts.mask)

    def step(self, rollouts: Rollouts, index: torch.Tensor, evaluated: Evaluation | None = None) -> dict[str, float]:
        """One optimiser step; all responses count alike. See `Trainer.descend`."""
        batch = rollouts[index]
        learnt = batch.learnt(self.config.mask_truncated)
        return self.descend(replace(batch, weights=learnt / learnt.any(1).sum().clamp(min=1)), evaluated)

    def loss(self, batch: Rollouts, now: Evaluation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, ``-min(ratio A, clip(ratio) A)`` with the ratio of whole responses, less
        the entropy bonus; and its terms: sums over responses, each weighted by 1 / minibatch size."""
        log_ratio = ((now.logprobs - batch.logprobs) * batch.mask).sum(1)
        bounds = (self.config.clip, self.config.clip_high, self.config.max_ratio)
        loss, clipped = clipped_surrogate(torch.exp(log_ratio), batch.advantages[:, 0], *bounds)
        by_response, tokens = batch.weights[:, 0], batch.mask.sum(1)
        terms = {
            "policy_loss": loss,
            "entropy_nats": now.entropy.sum(1) / tokens,
            "clip_fraction": clipped,
            "ratio_kl_nats": -log_ratio / tokens,
        }
        terms = {name: (by_response * term).sum() for name, term in terms.items()}
        return terms["policy_loss"] - self.config.entropy_coefficient * terms["entropy_nats"], terms
