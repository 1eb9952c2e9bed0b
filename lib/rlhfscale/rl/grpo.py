"""Group-relative policy optimisation (Shao et al. 2024): a response is judged against the others to the same prompt.

PPO without a critic: the advantage is the reward's distance from its group's mean, the same at every token of a
response, and the divergence from the reference is a term of the loss (k3) rather than of the reward.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models.loading import POLICY
from rlhfscale.rewards.base import Reward, TextFunction
from rlhfscale.rl import networks
from rlhfscale.rl.advantages import group_relative
from rlhfscale.rl.config import GRPOConfig
from rlhfscale.rl.kl import adapted, kl_terms
from rlhfscale.rl.learner import Learner
from rlhfscale.rl.loop import Run, Trainer, learner_options, network_options
from rlhfscale.rl.losses import clipped_surrogate, token_weights
from rlhfscale.rl.metrics import rollout_metrics, summed
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.rl.rollout import Evaluation, Prompt, Rollouts, evaluate, evaluate_all, evaluate_before_training
from rlhfscale.samplers import Completions, hf


class GRPO(Trainer):
    """A GRPO run; arguments as `PPO`, with ``responses_per_prompt`` of at least 2."""

    algorithm = "grpo"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward | TextFunction,
        config: GRPOConfig | None = None,
        *,
        seed: int = 0,
        sampler: Callable[..., Completions] = hf.sample,
    ):
        self.config = config = config or GRPOConfig()
        self.run = Run(tokenizer, reward, sampler, seed, config)
        self.networks = networks.build(model, critic="none", seed=seed, **network_options(config))
        self.run.attach(self.networks)
        self.learner = Learner(self.networks, {POLICY: config.policy_lr}, **learner_options(config))
        self.kl_coefficient = config.kl_coefficient

    def update(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], Completions]:
        """One update on fresh roll-outs; arguments, result and errors as `PPO.update`."""
        config = self.config
        rollouts, completions = self.run.collect(self.networks, prompts)
        rollouts, evaluated = self.evaluate(rollouts)
        self.run.check_sampler(rollouts)
        advantages = group_relative(rollouts.scores, config.responses_per_prompt, scale=config.scale_advantages)
        rollouts = replace(rollouts, advantages=advantages[:, None] * rollouts.mask)

        self.learner.set_rates(self.run.num_updates)
        steps = []
        for index in self.run.minibatches(len(rollouts)):
            steps.append(self.step(rollouts, index, evaluated))
            evaluated = None  # the policy has moved
            if config.max_ratio_kl is not None and steps[-1]["ratio_kl_nats"] > config.max_ratio_kl:
                break

        metrics = rollout_metrics(rollouts, steps, self.kl_coefficient)
        self.kl_coefficient = adapted(
            self.kl_coefficient, metrics["kl_nats"], config.kl_target, len(rollouts), config.kl_horizon
        )
        self.run.num_updates += 1
        return metrics, completions

    def evaluate(self, rollouts: Rollouts) -> tuple[Rollouts, Evaluation | None]:
        """Fill in log-probabilities of policy and reference; see `PPO.evaluate`."""
        most, first = self.config.max_tokens_per_pass, next(self.run.minibatches(len(rollouts)))
        reference = evaluate_all(self._evaluate_reference, rollouts, most)
        now, of_first = evaluate_before_training(self._evaluate, rollouts, most, first)
        return replace(rollouts, logprobs=now.logprobs, ref_logprobs=reference.logprobs), of_first

    def step(self, rollouts: Rollouts, index: torch.Tensor, evaluated: Evaluation | None = None) -> dict[str, float]:
        """One optimiser step on the roll-outs at ``index``, and its record; see `PPO.step`."""
        config = self.config
        batch = rollouts[index]
        batch = replace(batch, weights=token_weights(batch.mask, config.loss_weights, config.max_new_tokens))
        num_tokens = int(batch.mask.sum())
        with self.learner.step(self.run.num_updates) as record:
            parts = []
            for part in batch.passes(config.max_tokens_per_pass):
                loss, terms = self.loss(part, evaluated or self._evaluate(part), num_tokens)
                loss.backward()
                parts.append(terms)
            record.update(summed(parts))
        return record

    def loss(self, batch: Rollouts, now: Evaluation, num_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, and its terms: the loss by ``batch.weights``, the rest as this part's
        share of a mean over the minibatch's ``num_tokens`` response tokens."""
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

    def _evaluate(self, batch: Rollouts) -> Evaluation:
        entropy_gradient = self.config.entropy_coefficient > 0
        return evaluate(self.networks, batch, POLICY, self.config.temperature, entropy_gradient=entropy_gradient)

    def _evaluate_reference(self, batch: Rollouts) -> Evaluation:
        return evaluate(self.networks, batch, REFERENCE, self.config.temperature)
