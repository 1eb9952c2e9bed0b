"""The training run that outcome, process and mixed reward models share; they differ in their batches and losses."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from rlhfscale.rewards import scorer

Batch = TypeVar("Batch")


def run(
    model: scorer.Scored,
    epoch: Callable[[np.random.Generator], Iterable[Batch]],
    loss_of: Callable[[scorer.Scored, Batch], tuple[torch.Tensor, dict[str, float]]],
    *,
    epochs: int,
    lr: float,
    lora_rank: int,
    seed: Sequence[int],
    muon_lr: float | None = None,
    merge: bool = True,
) -> tuple[scorer.Scored, list[dict[str, float]]]:
    """Train a sequence classifier with one output: one optimiser step for each batch of each epoch.

    Args:
        model: e.g. from ``models.loading.load_scorer(..., init_seed=0)``; trained in place.
        epoch: makes the batches of one epoch, in an order drawn from the generator.
        loss_of: the loss of a batch under the model (a scalar), and what else to record of the step.
        epochs: passes over the data.
        lr: AdamW's learning rate. muon_lr: Muon's for the matrices; needed where all weights are trained.
        lora_rank: rank of the adapters to train beside the head; 0 trains all weights.
        seed: entropy of the adapters and of the order of the batches.
        merge: fold the adapters into the weights at the end, which rounds to the weights' precision; not for a
            quantised or sharded model.

    Returns:
        the trained model, and one record for each step: step, loss, and what ``loss_of`` adds.

    Raises:
        ValueError: an option that does not fit the model (see `scorer.prepare`), or fewer than one epoch.
        lm.Diverged: a loss or its gradient is not finite.
    """
    scorer.at_least_one(epochs=epochs)
    rng = np.random.default_rng(seed)
    trained = scorer.prepare(model, lora_rank, merge, rng)
    optimizers = scorer.optimizers(trained, lr, muon_lr)
    batches = [batch for _ in range(epochs) for batch in epoch(rng)]
    records = scorer.fit(trained, batches, partial(loss_of, trained), optimizers)
    return scorer.finish(trained, merge), records
