"""Group-relative policy optimisation (Shao et al. 2024), which compares a response with the others to the same prompt.

There is no critic. The advantage is the distance of the score from the mean of its group, the same at every token of a
response. The divergence from the reference is a term of the loss (k3), not of the reward. The rest of an update is
`loop.Trainer.update`.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import model_validator

from rlhfscale.rl.advantages import group_relative
from rlhfscale.rl.config import GroupedConfig
from rlhfscale.rl.kl import kl_terms
from rlhfscale.rl.loop import Trainer
from rlhfscale.rl.losses import clipped_surrogate, clipped_weight, sequence_ratio, token_weights
from rlhfscale.rl.rollout import Evaluation, Rollouts


class GRPOConfig(GroupedConfig):
    """Hyper-parameters of GRPO, beside those of `Config`.

    Attributes:
        scale_advantages: divide a group's advantages by its standard deviation (Shao et al. 2024), do not (Liu et al.
            2025), or by that of the whole "batch" (Lite PPO: Liu et al. 2025b, section 3.1).
        loss_weights: "token": all response tokens of a step count alike; "sequence": all responses do (Shao et al.
            2024); "constant": a token counts 1 / max_new_tokens of a response (Liu et al. 2025).
        ratio: the probability ratio of each "token", or of the whole "sequence", normalised by length (GSPO: Zheng et
            al. 2025, eq. 7).
        surrogate: "clipped", or "cispo": REINFORCE whose importance weight is at most 1 + clip_high (MiniMax-M1 2025,
            eq. 4).
        kl_weighted: weight the KL term of each token by its ratio, which makes its gradient unbiased (DeepSeek-V3.2
            2025, eq. 7); else it is that of Shao et al. 2024.
    """

    scale_advantages: bool | Literal["batch"] = True
    loss_weights: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clipped", "cispo"] = "clipped"
    kl_weighted: bool = False

    @model_validator(mode="after")
    def _cispo_has_one_bound(self) -> "GRPOConfig":
        if self.surrogate == "cispo" and self.max_ratio is not None:
            raise ValueError("max_ratio: without use in surrogate='cispo', whose weight clip_high bounds")
        return self


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
        learnt = batch.learnt(self.config.mask_truncated)
        weights = token_weights(learnt, self.config.loss_weights, self.config.max_new_tokens)
        return self.descend(replace(batch, weights=weights), evaluated, num_tokens=max(1, int(learnt.sum())))

    def loss(self, batch: Rollouts, now: Evaluation, num_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, ``-min(ratio A, clip(ratio) A) + beta k3`` (Shao et al. 2024, eq. 3) less
        the entropy bonus, weighted by ``batch.weights``; and its terms, of which all but the loss are this part's share
        of a mean over the ``num_tokens`` response tokens of the minibatch."""
        learnt = batch.learnt(self.config.mask_truncated)
        config, log_ratio = self.config, now.logprobs - batch.logprobs
        ratio = sequence_ratio(log_ratio, batch.mask) if config.ratio == "sequence" else torch.exp(log_ratio)
        if config.surrogate == "cispo":
            high = config.clip if config.clip_high is None else config.clip_high
            policy_loss, clipped = clipped_weight(ratio, now.logprobs, batch.advantages, high)
        else:
            bounds = (config.clip, config.clip_high, config.max_ratio)
            policy_loss, clipped = clipped_surrogate(ratio, batch.advantages, *bounds)
        kl = kl_terms(now.logprobs, batch.ref_logprobs, "k3")
        policy_loss = policy_loss + self.kl_coefficient * (ratio * kl if config.kl_weighted else kl)
        policy_loss, entropy = ((batch.weights * term).sum() for term in (policy_loss, now.entropy))
        observed = {
            "entropy_nats": now.entropy,
            "clip_fraction": clipped,
            "ratio_kl_nats": -log_ratio,
        }
        means = {name: (learnt * term).sum() / num_tokens for name, term in observed.items()}
        return policy_loss - config.entropy_coefficient * entropy, {"policy_loss": policy_loss} | means
