"""Group-relative policy optimisation (Shao et al. 2024), which compares a response with the others to the same prompt.

There is no critic. The advantage is the distance of the score from the mean of its group, the same at every token of a
response. The divergence from the reference is a term of the loss (k3), not of the reward. The rest of an update is
`loop.Trainer.update`.
"""

from dataclasses import replace
from typing import Literal

import torch

from rlhfscale.rl.advantages import group_relative
from rlhfscale.rl.config import GroupedConfig
from rlhfscale.rl.kl import kl_terms
from rlhfscale.rl.loop import Trainer
from rlhfscale.rl.losses import clipped_surrogate, token_weights
from rlhfscale.rl.rollout import Evaluation, Rollouts


class GRPOConfig(GroupedConfig):
    """Hyper-parameters of GRPO, beside those of `Config`.

    Attributes:
        scale_advantages: divide a group's advantages by its standard deviation (Shao et al. 2024), or do not (Liu et
            al. 2025).
        loss_weights: "token": all response tokens of a step count alike; "sequence": all responses do (Shao et al.
            2024); "constant": a token counts 1 / max_new_tokens of a response (Liu et al. 2025).
    """

    scale_advantages: bool = True
    loss_weights: Literal["token", "sequence", "constant"] = "token"


class GRPO(Trainer):
    """A GRPO run of any causal language model with any reward; arguments and errors as in `loop.Trainer`."""

    algorithm, config_type = "grpo", GRPOConfig

    def estimate_advantages(self, rollouts: Rollouts) -> Rollouts:
        """Advantages of the scores within each prompt's group, the same at every token of a response."""
        config = self.config
        advantages = group_relative(rollouts.scores, config.responses_per_prompt, scale=config.scale_advantages)
        return replace(rollouts, advantages=advantages[:, None] * rollouts.mask)

    def step(self, rollouts: Rollouts, index: torch.Tensor, evaluated: Evaluation | None = None) -> dict[str, float]:
        """One optimiser step; tokens count as ``loss_weights`` says. See `Trainer.descend`."""
        batch = rollouts[index]
        weights = token_weights(batch.mask, self.config.loss_weights, self.config.max_new_tokens)
        return self.descend(replace(batch, weights=weights), evaluated, num_tokens=int(batch.mask.sum()))

    def loss(self, batch: Rollouts, now: Evaluation, num_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, ``-min(ratio A, clip(ratio) A) + beta k3`` (Shao et al. 2024, eq. 3) less
        the entropy bonus, weighted by ``batch.weights``; and its terms, of which all but the loss are this part's share
        of a mean over the ``num_tokens`` response tokens of the minibatch."""
        ratio = torch.exp(now.logprobs - batch.logprobs)
        policy_loss, clipped = clipped_surrogate(ratio, batch.advantages, self.config.clip)
        policy_loss = policy_loss + self.kl_coefficient * kl_terms(now.logprobs, batch.ref_logprobs, "k3")
        policy_loss, entropy = ((batch.weights * term).sum() for term in (policy_loss, now.entropy))
        observed = {
            "entropy_nats": now.entropy,
            "clip_fraction": clipped,
            "ratio_kl_nats": batch.logprobs - now.logprobs,
        }
        means = {name: (batch.mask * term).sum() / num_tokens for name, term in observed.items()}
        return policy_loss - self.config.entropy_coefficient * entropy, {"policy_loss": policy_loss} | means
