"""What the trainers share outside of their equations: drawing roll-outs, minibatches, the outer loop, resuming."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from rlhfscale.models import loading, parallel
from rlhfscale.rewards.base import as_reward
from rlhfscale.rewards.shared import attach
from rlhfscale.rl import learner
from rlhfscale.rl.config import Config
from rlhfscale.rl.rollout import Prompt, Rollouts, collect, encode
from rlhfscale.samplers import Completions, repeated, request_seeds

Prompts = Sequence[Prompt] | Callable[[int], Sequence[Prompt]]
"""A list that is passed through in random order again and again, or a function from an update's index to its
prompts."""

CHECKPOINT, METRICS = "checkpoint", "metrics.csv"


class SamplerGap(RuntimeError):
    """The sampler's log-probabilities are not those of the policy that is trained."""


class Run:
    """A trainer's prompts, rewards and random numbers.

    Every random number follows from the seed and the number of updates done, so that is all there is to resume.

    Raises:
        ValueError: a tokenizer without end-of-sequence token.
        TypeError: what was given as reward can score nothing.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reward: Any,
        sampler: Callable[..., Completions],
        seed: int,
        config: Config,
    ):
        loading.token_ids(tokenizer)
        self.tokenizer, self.reward, self.sampler = tokenizer, as_reward(reward), sampler
        self.seed, self.config = seed, config
        self.num_updates = 0

    def attach(self, networks) -> None:
        """Let rewards that share the networks' base be read on it."""
        attach(self.reward, networks)

    def collect(self, networks, prompts: Sequence[Prompt]) -> tuple[Rollouts, Completions]:
        """Fresh roll-outs, the responses to one prompt in a row.

        Raises ValueError for a wrong number of prompts, or one that is empty or too long for the context.
        """
        config = self.config
        if len(prompts) != config.prompts_per_update:
            raise ValueError(f"prompts: {len(prompts)} given, prompts_per_update is {config.prompts_per_update}")
        encoded = encode(self.tokenizer, prompts)
        check_lengths(encoded, networks.base.config, config.max_new_tokens)
        asked = repeated(encoded, config.responses_per_prompt, config.temperature)
        return collect(
            networks,
            self.tokenizer,
            self.reward,
            self.sampler,
            asked,
            request_seeds((self.seed, 1, self.num_updates), len(asked)),
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            missing_eos_penalty=config.missing_eos_penalty,
        )

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

    def minibatches(self, num_rollouts: int) -> Iterator[torch.Tensor]:
        """int64 [minibatch]: every epoch's roll-outs in an order of its own."""
        rng = np.random.default_rng((self.seed, 0, self.num_updates))
        for _ in range(self.config.epochs):
            order = torch.from_numpy(rng.permutation(num_rollouts))
            yield from order.split(self.config.rollouts_per_step)

    def state(self) -> dict:
        return {"seed": self.seed, "config": self.config.model_dump(mode="json")}


def check_lengths(prompts: Sequence[Sequence[int]], config, max_new_tokens: int) -> None:
    """Raise ValueError for a prompt that is empty or does not fit into the context with its response."""
    context = getattr(config, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least the begin-of-sequence token")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's"
                f" context of {context}"
            )


def network_options(config: Config) -> dict[str, Any]:
    """The part of a config that `networks.build` takes."""
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    return {
        "adapter": config.adapter,
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        "targets": targets,
        "gradient_checkpointing": config.gradient_checkpointing,
        "compute_dtype": torch.bfloat16 if config.compute_dtype == "bf16" else None,
    }


def learner_options(config: Config) -> dict[str, Any]:
    """The part of a config that `Learner` takes."""
    return {name: getattr(config, name) for name in ("warmup_updates", "weight_decay", "max_grad_norm")}


class Trainer:
    """The outer loop, saving and resuming of a trainer that has `run`, `networks`, `learner`, `kl_coefficient` and
    ``update(prompts)``; the equations are in the trainers."""

    algorithm: str

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
            prompts: a list, drawn from without replacement; or a function from an update's index to its prompts.
            folder: where metrics.csv and, every ``checkpoint_every`` updates and at the end, a checkpoint are written.
                A run found there is continued, to the same numbers as if it had never stopped.
            tensorboard: also write TensorBoard events there.
            progress: show a progress bar.
            on_update: called after each update with its index, metrics and responses; what it returns is logged too.

        Returns:
            one row of metrics for each update (see `rl.metrics`).

        Raises:
            learner.CheckpointError: the folder holds a run of another model, config or seed.
        """
        folder = Path(folder) if folder is not None else None
        source = prompts if callable(prompts) else self._shuffled(prompts)
        records = self._resume(folder) if folder else []
        parallel.barrier()  # nobody writes before all have read
        writer = _tensorboard(folder) if tensorboard and parallel.rank() == 0 else None
        left = range(self.run.num_updates, num_updates)
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
        state = self._identity() | {"num_updates": self.run.num_updates, "kl_coefficient": self.kl_coefficient}
        self.learner.save(Path(folder), state)

    def load(self, folder: str | Path) -> None:
        """Continue from a checkpoint of the same algorithm, model, config and seed.

        Raises:
            learner.CheckpointError: there is none, or it is another run's; the message names what differs.
        """
        state = self.learner.load(Path(folder), self._identity())
        self.run.num_updates, self.kl_coefficient = state["num_updates"], state["kl_coefficient"]

    def _identity(self) -> dict:
        return {"algorithm": self.algorithm} | self.run.state()

    def _resume(self, folder: Path) -> list[dict[str, float]]:
        folder.mkdir(parents=True, exist_ok=True)
        if not learner.spread(folder / CHECKPOINT):
            return []
        self.load(folder / CHECKPOINT)
        metrics = pd.read_csv(folder / METRICS) if (folder / METRICS).exists() else pd.DataFrame({"update": []})
        records = metrics[metrics["update"] < self.run.num_updates].to_dict("records")
        return json.loads(parallel.of_first(json.dumps(records).encode()))

    def _shuffled(self, prompts: Sequence[Prompt]) -> Callable[[int], list[Prompt]]:
        """Prompts in an order that depends on the seed and the update alone: epochs of permutations, end to end."""
        if len(prompts) == 0:
            raise ValueError("prompts: none given")
        seed, count = self.run.seed, self.run.config.prompts_per_update

        def draw(update: int) -> list[Prompt]:
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
