"""What PPO, GRPO and RLOO do alike in one update, around their own advantages and losses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models import loading
from rlhfscale.models.loading import POLICY
from rlhfscale.models.sequences import Conversation, Encoded, Sequences
from rlhfscale.rewards.base import Reward, TextFunction, as_reward, checked
from rlhfscale.rewards.shared import attach, check_conversations
from rlhfscale.rl import dynamic, learner, networks, rollout
from rlhfscale.rl.config import Config
from rlhfscale.rl.kl import adapted
from rlhfscale.rl.losses import sampler_weights
from rlhfscale.rl.metrics import explained_variance, rollout_metrics, summed
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.rl.outer import OuterLoop
from rlhfscale.rl.rollout import Evaluation, Prompt, Rollouts
from rlhfscale.samplers import Completions, hf, repeated, request_seeds, together


class SamplerGap(RuntimeError):
    """The sampler's log-probabilities are not those of the policy that is trained."""


class Trainer(OuterLoop):
    """A run of one algorithm, which adds three methods:

    - ``estimate_advantages(rollouts)`` fills in the advantages, from scores, log-probabilities and values;
    - ``loss(part, evaluation)`` is the loss of a part of a minibatch;
    - ``step(rollouts, index)`` says what each token counts in the loss, and calls `descend`.

    Args:
        model: the causal language model to train. It is frozen and given adapters in place, or trained whole, as
            ``config.adapter`` says.
        tokenizer: the model's tokenizer.
        reward: a function ``(prompts, responses) -> rewards`` of lists of text; or an object with ``score(sequences)``,
            such as a reward model or a mixture of `rlhfscale.rewards`.
        config: hyper-parameters; the algorithm's defaults unless given.
        seed: decides adapters, sampling, and the order of prompts and of minibatches.
        sampler: draws the responses, see `samplers`.

    Raises:
        ValueError, TypeError: a model, tokenizer or reward cannot be used. This is found before anything is computed.
    """

    algorithm: str
    config_type: type[Config]

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward | TextFunction,
        config: Any = None,
        *,
        seed: int = 0,
        sampler: Callable[..., Completions] = hf.sample,
    ):
        self.config = config = config or self.config_type()
        loading.check_tokenizer(tokenizer, model)
        self.tokenizer, self.reward, self.sampler = tokenizer, as_reward(reward), sampler
        self.seed, self.num_updates, self.num_replacements = seed, 0, 0
        self.records: list[dict[str, Any]] = []  # of the updates so far
        self.rollouts: Rollouts | None = None  # of the last update
        self.talks: dict[tuple[int, ...], Conversation] = {}  # of its prompts, by their ids
        self.prompts_hash: str | None = None  # of the prompts of `train`; a function's are not known beforehand
        targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
        self.networks = networks.build(
            model,
            adapter=config.adapter,
            critic=getattr(config, "critic", "none"),  # PPO alone has one
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=targets,
            gradient_checkpointing=config.gradient_checkpointing,
            compute_dtype=torch.bfloat16 if config.compute_dtype == "bf16" else None,
            seed=seed,
        )
        try:
            attach(self.reward, self.networks)
        except Exception:
            self.release()
            raise
        self.learner = learner.Learner(
            self.networks,
            config.learning_rates,
            warmup_updates=config.warmup_updates,
            schedule=config.lr_schedule,
            decay_updates=config.decay_updates,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )
        self.kl_coefficient = config.kl_coefficient

    def release(self) -> PreTrainedModel:
        """Give the model back without the adapters, so that another trainer can have it; a model that was trained whole
        comes back as it is now. Save first what is to be kept: this trainer cannot be used any more."""
        return self.networks.release()

    def update(
        self, prompts: Iterable[Prompt], more: Callable[[int], Sequence[Prompt]] | None = None
    ) -> tuple[dict[str, float], Completions]:
        """Sample, score, estimate advantages, and take a few epochs of optimiser steps.

        Args:
            prompts: ``prompts_per_update`` prompts: text, token ids or conversations.
            more: draws a number of further prompts, for dynamic sampling.

        Returns:
            the update's metrics (see `rl.metrics`), and the responses, prompt by prompt.

        Raises:
            ValueError: see `collect`.
            SamplerGap: the sampler drew from another policy (see ``max_sampler_gap``).
            dynamic.NoSignal: dynamic sampling found no group that teaches anything.
            lm.Diverged: a loss or a gradient is not finite.
        """
        config, prompts = self.config, list(prompts)
        if len(prompts) != config.prompts_per_update:
            raise ValueError(f"prompts: {len(prompts)} given, prompts_per_update is {config.prompts_per_update}")
        before = self.num_replacements
        try:
            rollouts, completions, replaced = self.gather(prompts, more)
            rollouts, evaluated = self.evaluate(rollouts)
            self.check_sampler(rollouts)
        except BaseException:
            self.num_replacements = before  # the same update can be asked for again
            raise
        rollouts = self.corrected(self.estimate_advantages(rollouts))

        self.learner.set_rates(self.num_updates)
        steps = []
        for index in self.minibatches(len(rollouts)):
            steps.append(self.step(rollouts, index, evaluated))
            evaluated = None  # the networks have moved
            if config.max_ratio_kl is not None and steps[-1]["ratio_kl_nats"] > config.max_ratio_kl:
                break

        metrics = rollout_metrics(rollouts, steps, self.kl_coefficient) | replaced
        if self.networks.value_head:
            metrics["explained_variance"] = explained_variance(rollouts)
        self.kl_coefficient = adapted(
            self.kl_coefficient, metrics["kl_nats"], config.kl_target, len(rollouts), config.kl_horizon
        )
        self.num_updates += 1
        self.rollouts = rollouts
        return metrics, completions

    def gather(
        self, prompts: Sequence[Prompt], more: Callable[[int], Sequence[Prompt]] | None
    ) -> tuple[Rollouts, Completions, dict[str, float]]:
        """The responses that an update learns from, after dynamic sampling where it is on, and what to log of that."""
        self.talks = {}
        batch = self.collect(prompts)
        rounds = getattr(self.config, "dynamic_sampling", 0)
        if not rounds:
            return *batch, {}
        options = {"group_size": self.config.responses_per_prompt, "rounds": rounds}
        batch, count = dynamic.replaced(batch, self.collect, more or _no_more, **options)
        return *batch, {"replaced_groups": count}

    @torch.no_grad()
    def collect(self, prompts: Iterable[Prompt], draw: int = 0) -> tuple[Rollouts, Completions]:
        """Sample and score responses; those to one prompt stand in a row. Each ``draw`` of an update has own seeds.

        A sampler that keeps a copy of the policy elsewhere first receives the current policy, by its ``push``.

        Returns:
            the roll-outs, whose log-probabilities and values are still 0, and the responses as they were sampled.

        Raises:
            ValueError: a prompt is empty or too long for the context; a response is empty; or the scores are not one
                finite number for each response (names the index).
        """
        config = self.config
        encoded = rollout.encode(self.tokenizer, prompts)
        self.check_prompts(encoded)
        self.talks |= {tuple(ids): ids.messages for ids in encoded if isinstance(ids, Encoded)}
        stream = (self.seed, 1, self.num_updates, draw) if draw else (self.seed, 1, self.num_updates)
        sequences, completions = self._sampled(
            repeated(encoded, config.responses_per_prompt, config.temperature), stream
        )
        device = self.networks.base.device
        scores = torch.from_numpy(checked(self.reward.score(sequences), len(sequences))).to(device)
        rollouts = rollout.from_sequences(sequences, completions, device)
        scores = scores - config.missing_eos_penalty * (~rollouts.finished)
        if config.overlong_tokens is not None:
            start = config.max_new_tokens - config.overlong_tokens
            beyond = (rollouts.mask.sum(1) - start).clamp(min=0) / config.overlong_tokens
            scores = scores - config.overlong_penalty * beyond
        return replace(rollouts, scores=scores), completions

    def _sampled(self, prompts: list[list[int]], stream: tuple[int, ...]) -> tuple[Sequences, Completions]:
        """A response of the policy to each prompt, joined with it; ``stream`` decides the draws."""
        config = self.config
        options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        if hasattr(self.sampler, "push"):
            self.sampler.push(self.networks)
        seeds = request_seeds(stream, len(prompts))
        with self.networks.decoder() as policy:
            found = together.sample(self.sampler, policy, prompts, seeds=seeds, tokenizer=self.tokenizer, **options)
        return rollout.joined(prompts, found, self.tokenizer), found

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise ValueError for a prompt that is empty, does not fit into the context with its response, or holds an id
        that the model has no embedding for (names the prompt)."""
        base, new = self.networks.base, self.config.max_new_tokens
        context, rows = getattr(base.config, "max_position_embeddings", None), loading.num_embeddings(base)
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty; give at least the begin-of-sequence token")
            if context is not None and len(prompt) + new > context:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={new} it exceeds the model's context"
                    f" of {context}"
                )
            if not 0 <= min(prompt) <= max(prompt) < rows:
                raise ValueError(f"prompt {index} holds ids beyond the model's embedding of {rows} tokens")
        check_conversations(self.reward, [ids.messages for ids in prompts if isinstance(ids, Encoded)])

    def check_sampler(self, rollouts: Rollouts) -> None:
        """Raise SamplerGap where the sampler drew from another policy than the trainer evaluated (see `Config`)."""
        bound, gap = self.config.max_sampler_gap, rollouts.sampler_gaps.abs().mean().item()
        if bound is not None and not gap <= bound:
            raise SamplerGap(
                f"update {self.num_updates}: the sampler's and the trainer's log-probabilities of a token differ by"
                f" {gap:.2g} nats on average, max_sampler_gap is {bound:g}. Check that the sampler was started with the"
                " model that is trained, in the same dtype, and that adapters reach it; for bf16 or a 4-bit base, whose"
                " rounding alone makes a gap, raise the bound above what sampler_gap_mean_nats shows at the start"
            )

    def evaluate(self, rollouts: Rollouts) -> tuple[Rollouts, Evaluation | None]:
        """Fill in the log-probabilities under policy and reference, and the critic's values where there is a critic.

        Returns:
            the roll-outs, and the evaluation with gradients that the first step needs (see `evaluate_before_training`).
        """
        most, first = self.config.max_tokens_per_pass, next(self.minibatches(len(rollouts)))
        reference = rollout.evaluate_all(self._evaluate_reference, rollouts, most)
        now, of_first = rollout.evaluate_before_training(self._evaluate, rollouts, most, first)
        values = rollouts.values if now.values is None else now.values
        filled = replace(rollouts, logprobs=now.logprobs, ref_logprobs=reference.logprobs, values=values)
        return filled, of_first

    def corrected(self, rollouts: Rollouts) -> Rollouts:
        """The roll-outs with each advantage times the importance weight of trainer against sampler (see `Config`).

        Every policy loss is linear in the advantage, so this weights the loss.
        """
        config = self.config
        if config.sampler_correction == "none":
            return rollouts
        weights = sampler_weights(
            rollouts.logprobs - rollouts.sampler_logprobs,
            rollouts.mask,
            level=config.sampler_correction_level,
            kind=config.sampler_correction,
            max_ratio=config.sampler_max_ratio,
        )
        return replace(rollouts, advantages=rollouts.advantages * weights)

    def minibatches(self, num_rollouts: int) -> Iterator[torch.Tensor]:
        """int64 [minibatch]: the roll-outs of each optimiser step; each epoch has its own random order."""
        rng = np.random.default_rng((self.seed, 0, self.num_updates))
        for _ in range(self.config.epochs):
            order = torch.from_numpy(rng.permutation(num_rollouts))
            yield from order.split(self.config.rollouts_per_step)

    def descend(self, batch: Rollouts, evaluated: Evaluation | None = None, **totals: int) -> dict[str, float]:
        """Take one optimiser step on a weighted minibatch, in passes of at most ``max_tokens_per_pass`` tokens.

        Args:
            batch: the minibatch, with ``weights``.
            evaluated: what the networks say of it now, with gradients; computed where it is None.
            totals: numbers of the whole minibatch that ``loss`` needs.

        Returns:
            the step's record: the terms of the loss summed over the passes, and the gradient norms.
        """
        with self.learner.step(self.num_updates) as record:
            parts = []
            for part in batch.passes(self.config.max_tokens_per_pass):
                loss, terms = self.loss(part, evaluated or self._evaluate(part), **totals)
                loss.backward()
                parts.append(terms)
            record.update(summed(parts))
        return record

    def _evaluate(self, batch: Rollouts) -> Evaluation:
        """Log-probabilities, entropies and, with a critic, values, all with gradients."""
        config, has_bonus = self.config, self.config.entropy_coefficient > 0
        options = {"entropy_gradient": has_bonus, "fp32": config.head_dtype == "fp32"}
        found = rollout.evaluate(self.networks, batch, POLICY, config.temperature, **options)
        separate = self.networks.critic_role != POLICY
        return replace(found, values=rollout.evaluate_values(self.networks, batch)) if separate else found

    def _evaluate_reference(self, batch: Rollouts) -> Evaluation:
        fp32 = self.config.head_dtype == "fp32"
        return rollout.evaluate(self.networks, batch, REFERENCE, self.config.temperature, fp32=fp32)


def _no_more(count: int) -> Sequence[Prompt]:
    raise ValueError("dynamic_sampling: update(prompts, more) needs a function that draws further prompts")
