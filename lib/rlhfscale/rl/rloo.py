"""REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024): a response is one action.

The reward, less the divergence from the reference, is compared with the mean of the other responses to the same prompt.
The probability ratio is that of the whole response, so several epochs are clipped as in PPO.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models.loading import POLICY
from rlhfscale.rewards.base import Reward, TextFunction
from rlhfscale.rl import networks
from rlhfscale.rl.advantages import leave_one_out
from rlhfscale.rl.config import RLOOConfig
from rlhfscale.rl.kl import adapted, sequence_kl
from rlhfscale.rl.learner import Learner
from rlhfscale.rl.loop import Run, Trainer, learner_options, network_options
from rlhfscale.rl.losses import clipped_surrogate
from rlhfscale.rl.metrics import rollout_metrics, summed
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.rl.rollout import Evaluation, Prompt, Rollouts, evaluate, evaluate_all, evaluate_before_training
from rlhfscale.samplers import Completions, hf


class RLOO(Trainer):
    """An RLOO run; arguments as `PPO`, with ``responses_per_prompt`` of at least 2."""

    algorithm = "rloo"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward | TextFunction,
        config: RLOOConfig | None = None,
        *,
        seed: int = 0,
        sampler: Callable[..., Completions] = hf.sample,
    ):
        self.config = config = config or RLOOConfig()
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
        kl = sequence_kl(rollouts.logprobs, rollouts.ref_logprobs, rollouts.mask)
        advantages = leave_one_out(rollouts.scores - self.kl_coefficient * kl, config.responses_per_prompt)
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
        batch = replace(batch, weights=batch.mask / len(batch))
        with self.learner.step(self.run.num_updates) as record:
            parts = []
            for part in batch.passes(config.max_tokens_per_pass):
                loss, terms = self.loss(part, evaluated or self._evaluate(part))
                loss.backward()
                parts.append(terms)
            record.update(summed(parts))
        return record

    def loss(self, batch: Rollouts, now: Evaluation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, and its terms: means over responses."""
        log_ratio = ((now.logprobs - batch.logprobs) * batch.mask).sum(1)
        loss, clipped = clipped_surrogate(torch.exp(log_ratio), batch.advantages[:, 0], self.config.clip)
        by_response, tokens = batch.weights[:, 0], batch.mask.sum(1)
        terms = {
            "policy_loss": loss,
            "entropy_nats": now.entropy.sum(1) / tokens,
            "clip_fraction": clipped,
            "ratio_kl_nats": -log_ratio / tokens,
        }
        terms = {name: (by_response * term).sum() for name, term in terms.items()}
        return terms["policy_loss"] - self.config.entropy_coefficient * terms["entropy_nats"], terms

    def _evaluate(self, batch: Rollouts) -> Evaluation:
        entropy_gradient = self.config.entropy_coefficient > 0
        return evaluate(self.networks, batch, POLICY, self.config.temperature, entropy_gradient=entropy_gradient)

    def _evaluate_reference(self, batch: Rollouts) -> Evaluation:
        return evaluate(self.networks, batch, REFERENCE, self.config.temperature)
