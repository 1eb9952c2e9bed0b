"""Proximal policy optimisation with a critic (Schulman et al. 2017), KL-penalised as in Stiennon et al. 2020.

One update, top to bottom: sample; score; penalise divergence from the reference; estimate advantages with the critic; a
few epochs of clipped losses on policy and critic. GRPO and RLOO are its siblings without a critic.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models.loading import CRITIC, POLICY
from rlhfscale.rewards.base import Reward, TextFunction
from rlhfscale.rl import networks
from rlhfscale.rl.advantages import gae, whiten
from rlhfscale.rl.config import PPOConfig
from rlhfscale.rl.kl import adapted, kl_terms
from rlhfscale.rl.learner import Learner
from rlhfscale.rl.loop import Run, Trainer, learner_options, network_options
from rlhfscale.rl.losses import clipped_surrogate, clipped_value, token_weights
from rlhfscale.rl.metrics import explained_variance, rollout_metrics, summed
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.rl.rollout import (
    Evaluation,
    Prompt,
    Rollouts,
    evaluate,
    evaluate_all,
    evaluate_before_training,
    evaluate_values,
    token_rewards,
)
from rlhfscale.samplers import Completions, hf


class PPO(Trainer):
    """A PPO run of any transformers causal language model with any reward.

    Args:
        model: the model to train; it is frozen and given adapters in place, or trained whole (``config.adapter``).
        tokenizer: its tokenizer.
        reward: a function ``(prompts, responses) -> rewards`` of lists of text, or an object with
            ``score(sequences)``, such as a reward model or a mixture of `rlhfscale.rewards`.
        config: hyper-parameters.
        seed: decides adapters, sampling, and the order of prompts and of minibatches.
        sampler: draws the responses, see `samplers`.

    Raises:
        ValueError, TypeError: a model, tokenizer or reward that cannot work, before any compute.
    """

    algorithm = "ppo"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward | TextFunction,
        config: PPOConfig | None = None,
        *,
        seed: int = 0,
        sampler: Callable[..., Completions] = hf.sample,
    ):
        self.config = config = config or PPOConfig()
        self.run = Run(tokenizer, reward, sampler, seed, config)
        self.networks = networks.build(model, critic=config.critic, seed=seed, **network_options(config))
        self.run.attach(self.networks)
        rates = {POLICY: config.policy_lr, CRITIC: config.critic_lr}
        self.learner = Learner(self.networks, rates, **learner_options(config))
        self.kl_coefficient = config.kl_coefficient

    def update(self, prompts: Sequence[Prompt]) -> tuple[dict[str, float], Completions]:
        """One update on fresh roll-outs.

        Args:
            prompts: ``prompts_per_update`` prompts: text, token ids or conversations.

        Returns:
            the update's metrics (see `rl.metrics`), and the responses, prompt by prompt.

        Raises:
            ValueError: a prompt that is empty or too long, a reward that is not finite or not one for each response.
            loop.SamplerGap: the sampler drew from another policy (see ``max_sampler_gap``).
            lm.Diverged: a loss or a gradient is not finite.
        """
        config = self.config
        rollouts, completions = self.run.collect(self.networks, prompts)
        rollouts, evaluated = self.evaluate(rollouts)
        self.run.check_sampler(rollouts)
        rollouts = self.estimate_advantages(rollouts)

        self.learner.set_rates(self.run.num_updates)
        steps = []
        for index in self.run.minibatches(len(rollouts)):
            steps.append(self.step(rollouts, index, evaluated))
            evaluated = None  # the networks have moved
            if config.max_ratio_kl is not None and steps[-1]["ratio_kl_nats"] > config.max_ratio_kl:
                break

        metrics = rollout_metrics(rollouts, steps, self.kl_coefficient)
        metrics["explained_variance"] = explained_variance(rollouts)
        self.kl_coefficient = adapted(
            self.kl_coefficient, metrics["kl_nats"], config.kl_target, len(rollouts), config.kl_horizon
        )
        self.run.num_updates += 1
        return metrics, completions

    def evaluate(self, rollouts: Rollouts) -> tuple[Rollouts, Evaluation | None]:
        """Fill in log-probabilities, reference log-probabilities and values; and what `evaluate_before_training` has
        for the first step."""
        most, first = self.config.max_tokens_per_pass, next(self.run.minibatches(len(rollouts)))
        reference = evaluate_all(self._evaluate_reference, rollouts, most)
        now, of_first = evaluate_before_training(self._evaluate, rollouts, most, first)
        filled = {"logprobs": now.logprobs, "values": now.values, "ref_logprobs": reference.logprobs}
        return replace(rollouts, **filled), of_first

    def estimate_advantages(self, rollouts: Rollouts) -> Rollouts:
        """Rewards at tokens, then advantages, whitened over response tokens, and returns."""
        config, scores = self.config, rollouts.scores
        if config.whiten_rewards:
            spread = scores.std(correction=min(1, len(scores) - 1))
            scores = scores / spread if spread > 1e-4 else scores
        kl = kl_terms(rollouts.logprobs, rollouts.ref_logprobs, config.kl_estimator)
        rewards = token_rewards(rollouts, scores, kl, self.kl_coefficient)
        advantages, returns = gae(rewards, rollouts.values, rollouts.mask, gamma=config.gamma, lam=config.lam)
        return replace(rollouts, advantages=whiten(advantages, rollouts.mask), returns=returns)

    def step(self, rollouts: Rollouts, index: torch.Tensor, evaluated: Evaluation | None = None) -> dict[str, float]:
        """One optimiser step of policy and critic on the roll-outs at ``index``, and its record.

        ``evaluated`` is what the networks say of these now, if that is known.
        """
        batch = rollouts[index]
        batch = replace(batch, weights=token_weights(batch.mask))
        with self.learner.step(self.run.num_updates) as record:
            parts = []
            for part in batch.passes(self.config.max_tokens_per_pass):
                loss, terms = self.loss(part, evaluated or self._evaluate(part))
                loss.backward()
                parts.append(terms)
            record.update(summed(parts))
        return record

    def loss(self, batch: Rollouts, now: Evaluation) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a part of a minibatch, and its terms: sums over tokens, weighted by ``batch.weights``."""
        config = self.config
        ratio = torch.exp(now.logprobs - batch.logprobs)
        policy_loss, clipped = clipped_surrogate(ratio, batch.advantages, config.clip)
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

    def _evaluate(self, batch: Rollouts) -> Evaluation:
        """Log-probabilities, entropies and values with gradients."""
        config = self.config
        found = evaluate(
            self.networks, batch, POLICY, config.temperature, entropy_gradient=config.entropy_coefficient > 0
        )
        return found if config.critic == "trunk" else replace(found, values=evaluate_values(self.networks, batch))

    def _evaluate_reference(self, batch: Rollouts) -> Evaluation:
        return evaluate(self.networks, batch, REFERENCE, self.config.temperature)
