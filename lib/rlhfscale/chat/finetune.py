"""Supervised fine-tuning of a language model by a LoRA adapter, on the networks that the trainers of `rl` use."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhfscale.models import parallel
from rlhfscale.models.documents import bucketed_batches
from rlhfscale.models.lm import warmup_stable_decay
from rlhfscale.models.loading import POLICY
from rlhfscale.models.sequences import Sequences
from rlhfscale.rl.learner import Learner
from rlhfscale.rl.logprobs import response_tokens, token_logprobs
from rlhfscale.rl.networks import SharedBase


def finetune(
    networks: SharedBase,
    data: Sequences,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: Sequence[int],
) -> list[float]:
    """Train the policy's adapter on the responses, and return each step's loss in nats a token.

    Args:
        networks: see `networks.build`; trained in place.
        data: prompts with the responses to learn; their end-of-sequence tokens are learnt too.
        epochs: passes over the data.
        batch_size: sequences in a step.
        lr: AdamW's rate at its highest; it warms up over a tenth of the steps and decays over the last 40%.
        seed: entropy of the order.

    Raises:
        ValueError: no sequences.
        lm.Diverged: the loss or its gradient is not finite.
    """
    if not len(data):
        raise ValueError("data: no sequences to learn from")
    rng = np.random.default_rng(seed)
    batches = [index for _ in range(epochs) for index in bucketed_batches(data.lengths, batch_size, rng)]
    learner = Learner(networks, {POLICY: lr}, warmup_updates=0, weight_decay=0.0, max_grad_norm=1.0)
    losses = []
    for step, index in enumerate(batches):
        factor = warmup_stable_decay(step, len(batches), warmup=max(1, len(batches) // 10))
        for group in learner.optimizer.param_groups:
            group["lr"] = factor * lr
        with learner.step(step) as record:
            loss = response_loss(networks, data[index])
            loss.backward()
            record["loss"] = loss.item()
        losses.append(record["loss"])
    return losses


def response_loss(networks: SharedBase, batch: Sequences) -> torch.Tensor:
    """Mean cross-entropy of the response tokens, in nats."""
    device = networks.base.device
    ids, prompt_lengths, lengths = (
        torch.from_numpy(x).to(device) for x in (batch.ids, batch.prompt_lengths, batch.lengths)
    )
    response, before = response_tokens(ids, prompt_lengths, lengths)
    rows = parallel.own(len(ids)).to(device)
    states = networks.hidden_at(ids[rows], before[rows], POLICY, prompt_lengths[rows], lengths[rows])
    logprobs, _ = token_logprobs(states, networks.output_head(POLICY), ids[rows][response[rows]], 1.0)
    laid_out = logprobs.new_zeros(response[rows].shape).masked_scatter(response[rows], logprobs)
    return -parallel.whole(laid_out, rows, len(ids))[response].mean()
