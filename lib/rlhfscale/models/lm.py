"""Training a language model on token sequences: the loop that pretraining and supervised fine-tuning share."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rlhfscale.models import llama
from rlhfscale.models.documents import Documents, bucketed_batches
from rlhfscale.models.optim import BatchedMuon


class Diverged(RuntimeError):
    """Training produced a value that is not finite; the message names the step and the metric."""


def response_loss(model: nn.Module, documents: Documents, index: np.ndarray, skip_prompt: bool) -> torch.Tensor:
    """Mean next-token cross-entropy in nats over the documents' tokens, or over their responses only.

    The output head is applied only to the positions that are scored.
    """
    ids, scored = _scored_positions(documents, index, skip_prompt)
    return F.cross_entropy(_logits(model, documents, index, ids, scored), ids[:, 1:][scored])


def _logits(model: nn.Module, documents: Documents, index: np.ndarray, ids: torch.Tensor, where: torch.Tensor):
    """float32 [position, vocabulary] after the tokens ``where``, bool [document, length - 1]."""
    if form := llama.form_of(model):
        states = form.hidden_at(ids[:, :-1], where, None, torch.from_numpy(documents.lengths[index] - 1))
    else:
        states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[where]
    return model.lm_head(states)


def _scored_positions(documents: Documents, index: np.ndarray, skip_prompt: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [document, length] without needless padding, and bool [document, length - 1]: which next tokens count."""
    width = int(documents.lengths[index].max())
    first = torch.from_numpy(documents.prompt_lengths[index] if skip_prompt else np.ones(len(index), np.int64))
    position = torch.arange(1, width)
    scored = (position >= first[:, None]) & (position < torch.from_numpy(documents.lengths[index])[:, None])
    return torch.from_numpy(documents.ids[index, :width]), scored


def optimizers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for every matrix but the embeddings (so also for a score head), AdamW for the rest."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        BatchedMuon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def warmup_stable_decay(step: int, num_steps: int, warmup: int = 50, decay_share: float = 0.4) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, constant, linear decay over the last part (Hu et al. 2024)."""
    return min(1.0, (step + 1) / warmup, (num_steps - step) / (decay_share * num_steps))


def train(
    model: nn.Module,
    documents: Documents,
    *,
    batch_size: int,
    lr: float,
    muon_lr: float,
    seed: Sequence[int],
    skip_prompt: bool,
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train for one epoch and return the loss of each step, in nats.

    Args:
        model: a causal language model, trained in place.
        documents: the training set, each document seen once.
        lr: learning rate of embeddings and norms; muon_lr: of the matrices.
        seed: entropy of the order of documents.
        skip_prompt: score the responses only.
        on_step: called with (step, number of steps, tokens seen) after each step.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    rng = np.random.default_rng(seed)
    batches = list(bucketed_batches(documents.lengths, batch_size, rng))
    chosen = optimizers(model, lr, muon_lr)
    base_rates = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    model.train()
    losses, tokens = [], 0
    for step, index in enumerate(batches):
        factor = warmup_stable_decay(step, len(batches))
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = factor * rate
        loss = response_loss(model, documents, index, skip_prompt)
        if not torch.isfinite(loss):
            raise Diverged(f"step {step}: loss is {loss.item()}; lower the learning rate")
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise Diverged(f"step {step}: gradient norm is {norm.item()}; lower the learning rate")
        for optimizer in chosen:
            optimizer.step()
        losses.append(loss.item())
        tokens += int(documents.lengths[index].sum())
        if on_step:
            on_step(step, len(batches), tokens)
    model.eval()
    return losses


@torch.no_grad()
def document_losses(model: nn.Module, documents: Documents, batch_size: int = 256) -> np.ndarray:
    """Summed cross-entropy in nats of each document's response, float64 [document]."""
    model.eval()
    losses = np.zeros(len(documents))
    order = np.argsort(documents.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        ids, scored = _scored_positions(documents, index, skip_prompt=True)
        logits = _logits(model, documents, index, ids, scored)
        nats = torch.zeros(scored.shape)
        nats[scored] = F.cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        losses[index] = nats.sum(1).double().numpy()
    return losses
