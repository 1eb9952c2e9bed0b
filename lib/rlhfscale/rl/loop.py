"""What PPO, GRPO and RLOO do alike: one update around their own advantages and losses, the outer loop, resuming."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models import loading, parallel
from rlhfscale.models.loading import POLICY
from rlhfscale.rewards.base import Reward, TextFunction, as_reward, checked
from rlhfscale.rewards.shared import attach
from rlhfscale.rl import learner, networks, rollout
from rlhfscale.rl.config import Config
from rlhfscale.rl.kl import adapted
from rlhfscale.rl.metrics import explained_variance, rollout_metrics, summed
from rlhfscale.rl.networks import REFERENCE
from rlhfscale.rl.rollout import Evaluation, Prompt, Rollouts
from rlhfscale.samplers import Completions, hf, repeated, request_seeds, together

Prompts = Iterable[Prompt] | Callable[[int], Iterable[Prompt]]
"""Prompts of a run: a collection, of which every update takes the next in random order; or a function from an update's
index to its prompts."""

CHECKPOINT, METRICS = "checkpoint", "metrics.csv"


class SamplerGap(RuntimeError):
    """The sampler's log-probabilities are not those of the policy that is trained."""


class Trainer:
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
        self.seed, self.num_updates = seed, 0
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
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )
        self.kl_coefficient = config.kl_coefficient

    def release(self) -> PreTrainedModel:
        """Give the model back without the adapters, so that another trainer can have it; a model that was trained whole
        comes back as it is now. Save first what is to be kept: this trainer cannot be used any more."""
        return self.networks.release()

    def update(self, prompts: Iterable[Prompt]) -> tuple[dict[str, float], Completions]:
        """Sample, score, estimate advantages, and take a few epochs of optimiser steps.

        Args:
            prompts: ``prompts_per_update`` prompts: text, token ids or conversations.

        Returns:
            the update's metrics (see `rl.metrics`), and the responses, prompt by prompt.

        Raises:
            ValueError: see `collect`.
            SamplerGap: the sampler drew from another policy (see ``max_sampler_gap``).
            lm.Diverged: a loss or a gradient is not finite.
        """
        config = self.config
        rollouts, completions = self.collect(prompts)
        rollouts, evaluated = self.evaluate(rollouts)
        self.check_sampler(rollouts)
        rollouts = self.estimate_advantages(rollouts)

        self.learner.set_rates(self.num_updates)
        steps = []
        for index in self.minibatches(len(rollouts)):
            steps.append(self.step(rollouts, index, evaluated))
            evaluated = None  # the networks have moved
            if config.max_ratio_kl is not None and steps[-1]["ratio_kl_nats"] > config.max_ratio_kl:
                break

        metrics = rollout_metrics(rollouts, steps, self.kl_coefficient)
        if self.networks.value_head:
            metrics["explained_variance"] = explained_variance(rollouts)
        self.kl_coefficient = adapted(
            self.kl_coefficient, metrics["kl_nats"], config.kl_target, len(rollouts), config.kl_horizon
        )
        self.num_updates += 1
        return metrics, completions

    @torch.no_grad()
    def collect(self, prompts: Iterable[Prompt]) -> tuple[Rollouts, Completions]:
        """Sample and score responses; those to one prompt stand in a row.

        A sampler that keeps a copy of the policy elsewhere first receives the current policy, by its ``push``.

        Returns:
            the roll-outs, whose log-probabilities and values are still 0, and the responses as they were sampled.

        Raises:
            ValueError: the number of prompts is wrong; a prompt is empty or too long for the context; a response is
                empty; or the scores are not one finite number for each response (names the index).
        """
        config, prompts = self.config, list(prompts)
        if len(prompts) != config.prompts_per_update:
            raise ValueError(f"prompts: {len(prompts)} given, prompts_per_update is {config.prompts_per_update}")
        encoded = rollout.encode(self.tokenizer, prompts)
        self.check_prompts(encoded)
        asked = repeated(encoded, config.responses_per_prompt, config.temperature)
        seeds = request_seeds((self.seed, 1, self.num_updates), len(asked))
        options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
        if hasattr(self.sampler, "push"):
            self.sampler.push(self.networks)
        with self.networks.decoder() as policy:
            completions = together.sample(self.sampler, policy, asked, seeds=seeds, tokenizer=self.tokenizer, **options)
            device = policy.device
        sequences = rollout.joined(asked, completions, self.tokenizer)
        scores = torch.from_numpy(checked(self.reward.score(sequences), len(sequences))).to(device)
        rollouts = rollout.from_sequences(sequences, completions, device)
        return replace(rollouts, scores=scores - config.missing_eos_penalty * (~rollouts.finished)), completions

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
        found = rollout.evaluate(self.networks, batch, POLICY, config.temperature, entropy_gradient=has_bonus)
        separate = self.networks.critic_role != POLICY
        return replace(found, values=rollout.evaluate_values(self.networks, batch)) if separate else found

    def _evaluate_reference(self, batch: Rollouts) -> Evaluation:
        return rollout.evaluate(self.networks, batch, REFERENCE, self.config.temperature)

    def train(
        self,
        prompts: Prompts,
        num_updates: int,
        *,
        folder: str | Path | None = None,
        checkpoint_every: int = 10,
        tensorboard: bool = False,
        progress: bool = True,
        on_update: Callable[[int, dict[str, float], Completions], dict[str, float] | None] | None = None,
    ) -> pd.DataFrame:
        """Train until ``num_updates`` updates are done in all.

        Args:
            prompts: all prompts, drawn from without replacement; or a function from an update's index to its prompts.
            folder: where metrics.csv and, every ``checkpoint_every`` updates and at the end, a checkpoint are written.
                A run found there is continued, to the same numbers as if it had never stopped. The checkpoint before is
                kept too, and used where the newest is damaged.
            tensorboard: also write TensorBoard events there.
            progress: show a progress bar.
            on_update: called after each update with its index, metrics and responses; what it returns is logged too.

        Returns:
            one row of metrics for each update (see `rl.metrics`).

        Raises:
            ValueError: prompts that `collect` would refuse.
            learner.CheckpointError: the folder holds a run of another model, config or seed, or of other prompts.
        """
        folder = Path(folder) if folder is not None else None
        source = prompts if callable(prompts) else self._shuffled(prompts)
        records = self._resume(folder) if folder else []
        parallel.barrier()  # nobody writes before all have read
        writer = _tensorboard(folder) if tensorboard and parallel.rank() == 0 else None
        left = range(self.num_updates, num_updates)
        bar = tqdm(left, disable=not progress or parallel.rank() > 0, desc=self.algorithm, unit="update")
        for update in bar:
            metrics, completions = self.update(source(update))
            records.append(
                {"update": update} | metrics | ((on_update and on_update(update, metrics, completions)) or {})
            )
            bar.set_postfix(proxy=f"{metrics['proxy']:.3f}", kl=f"{metrics['kl_nats']:.2f}")
            if writer:
                for name, value in records[-1].items():
                    writer.add_scalar(f"{self.algorithm}/{name}", value, update)
            if folder and parallel.rank() == 0 and ((update + 1) % checkpoint_every == 0 or update + 1 == num_updates):
                temporary = folder / (METRICS + ".tmp")
                pd.DataFrame(records).to_csv(temporary, index=False)
                temporary.replace(folder / METRICS)  # before the checkpoint: rows that are ahead of it are dropped
                self.save(folder / CHECKPOINT)
        parallel.barrier()
        if writer:
            writer.close()
        return pd.DataFrame(records)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint: adapters as plain PEFT folders, value head, optimiser, and what decides the rest."""
        state = self._identity() | {"num_updates": self.num_updates, "kl_coefficient": self.kl_coefficient}
        self.learner.save(Path(folder), state)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint of the same algorithm, model, config and seed.

        Raises:
            learner.CheckpointError: there is none, or it is another run's; the message names what differs.
        """
        state = self.learner.load(Path(folder), self._identity())
        self.num_updates, self.kl_coefficient = state["num_updates"], state["kl_coefficient"]

    def _identity(self) -> dict:
        config = self.config.model_dump(mode="json")
        found = {"algorithm": self.algorithm, "seed": self.seed, "config": config}
        return found | ({"prompts": self.prompts_hash} if self.prompts_hash else {})

    def _resume(self, folder: Path) -> list[dict[str, float]]:
        folder.mkdir(parents=True, exist_ok=True)
        if not learner.spread(folder / CHECKPOINT):
            return []
        self.load(folder / CHECKPOINT)
        metrics = pd.read_csv(folder / METRICS) if (folder / METRICS).exists() else pd.DataFrame({"update": []})
        records = metrics[metrics["update"] < self.num_updates].to_dict("records")
        return json.loads(parallel.of_first(json.dumps(records).encode()))

    def _shuffled(self, given: Iterable[Prompt]) -> Callable[[int], list[list[int]]]:
        """A function from an update's index to its prompts: one random permutation of all prompts after another.

        The order depends on the seed and the update alone. Raises ValueError for no prompt, or one that cannot be used.
        """
        if isinstance(given, str):
            raise ValueError("prompts: one text; give a list of texts")
        prompts = rollout.encode(self.tokenizer, given)
        if len(prompts) == 0:
            raise ValueError("prompts: none given")
        self.check_prompts(prompts)
        self.prompts_hash = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        seed, count = self.seed, self.config.prompts_per_update

        def draw(update: int) -> list[list[int]]:
            positions = np.arange(update * count, (update + 1) * count)
            orders = {
                epoch: np.random.default_rng((seed, 2, epoch)).permutation(len(prompts))
                for epoch in np.unique(positions // len(prompts)).tolist()
            }
            return [prompts[orders[p // len(prompts)][p % len(prompts)]] for p in positions.tolist()]

        return draw


def _tensorboard(folder: Path | None):
    if folder is None:
        raise ValueError("tensorboard: needs a folder to write to")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard: not installed; pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"))
