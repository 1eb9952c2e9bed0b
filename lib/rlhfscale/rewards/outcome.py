"""The outcome reward model: one score for a whole response, learned from comparisons within a prompt."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from rlhfscale import lm, models
from rlhfscale.data import Responses
from rlhfscale.ladder import PAD_ID


def bradley_terry(scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """``-log sigmoid(score_i - score_j)``, a mean over the pairs of a prompt in which i's gold exceeds j's.

    All pairs among a prompt's responses are used from one forward pass (Ouyang et al. 2022, eq. 1).

    Args:
        scores: float32 [prompt, sample].
        gold: float32 [prompt, sample]; ties make no pair.
    """
    better = gold[:, :, None] > gold[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    return -F.logsigmoid(margin[better]).mean()


def pair_accuracy(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """float64 [prompt]: share of a prompt's pairs with unequal gold that the scores order rightly, a tied score
    counting one half; NaN where all of a prompt's responses have equal gold."""
    better = gold[:, :, None] > gold[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    right = (margin > 0) + 0.5 * (margin == 0)
    pairs = better.sum((1, 2))
    return np.where(pairs > 0, (right * better).sum((1, 2)) / np.maximum(pairs, 1), np.nan)


class OutcomeRewardModel:
    """A trained reward model, frozen, that scores sequences.

    Attributes:
        model: a sequence-classification model with one output; its score is read at the last token, which is the
            end-of-sequence token of a finished response.
        mean, std: of the scores over the training responses, for normalisation.
    """

    def __init__(self, model: PreTrainedModel, mean: float, std: float):
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std = mean, std

    @classmethod
    def load(cls, folder: Path) -> "OutcomeRewardModel":
        scale = json.loads((folder / "scale.json").read_text())
        return cls(models.load_scorer(folder), scale["mean"], scale["std"])

    def score(self, ids: np.ndarray, lengths: np.ndarray, *, normalise: bool = False) -> np.ndarray:
        """Score whole sequences.

        Args:
            ids: int64 [sequence, length], prompt and response joined, padded on the right.
            lengths: int64 [sequence], at least 1.
            normalise: shift and scale to the training responses' mean 0 and standard deviation 1.

        Returns:
            float32 [sequence].
        """
        scores = score_sequences(self.model, ids, lengths)
        return (scores - self.mean) / self.std if normalise else scores


def score_sequences(model: nn.Module, ids: np.ndarray, lengths: np.ndarray, batch_size: int = 512) -> np.ndarray:
    """float32 [sequence]: the model's score at each sequence's last token; batches of similar length."""
    scores = np.zeros(len(ids), np.float32)
    order = np.argsort(lengths, kind="stable")
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            scores[index] = last_token_scores(model, ids[index], lengths[index]).numpy()
    return scores


def last_token_scores(model: nn.Module, ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """float32 [sequence], differentiable: the score head applied to the hidden state of the last token only."""
    width = int(lengths.max())
    batch = torch.from_numpy(ids[:, :width])
    trunk = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = trunk.model(input_ids=batch, attention_mask=(batch != PAD_ID).long(), use_cache=False).last_hidden_state
    last = torch.from_numpy(np.asarray(lengths, np.int64)) - 1
    return trunk.score(hidden[torch.arange(len(batch)), last]).squeeze(-1).float()


def train(
    model: PreTrainedModel,
    data: Sequence[Responses],
    *,
    epochs: int,
    prompts_per_batch: int,
    lr: float,
    muon_lr: float,
    lora_rank: int,
    seed: Sequence[int],
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """Train a scorer with the Bradley-Terry loss on all pairs within each prompt.

    Args:
        model: from ``models.load_scorer(..., init_seed=...)``; trained in place.
        data: labelled responses; their prompts are pooled.
        epochs: passes over the prompts.
        prompts_per_batch: prompts in a batch, each with all its responses.
        lr: AdamW's rate; muon_lr: of the matrices, if all weights are trained.
        lora_rank: 0 trains all weights, otherwise adapters of that rank are trained and folded in at the end.
        seed: entropy of the prompts' order and of the adapters.

    Returns:
        the trained model without adapters, and one record of step, loss and accuracy for each step.

    Raises:
        lm.Diverged: the loss is not finite.
    """
    rng = np.random.default_rng(seed)
    trained = _with_adapters(model, lora_rank, int(rng.integers(2**31))) if lora_rank else model
    trained.train()
    chosen = _optimizers(trained, lr, muon_lr, lora_rank)
    base_rates = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    batches = [batch for _ in range(epochs) for batch in _batches(data, prompts_per_batch, rng)]
    records = []
    for step, (ids, lengths, gold) in enumerate(batches):
        factor = lm.warmup_stable_decay(step, len(batches), warmup=20)
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = factor * rate
        scores = last_token_scores(trained, ids, lengths).view(gold.shape)
        loss = bradley_terry(scores, torch.from_numpy(gold))
        if not torch.isfinite(loss):
            raise lm.Diverged(f"step {step}: reward-model loss is {loss.item()}; lower the learning rate")
        trained.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.requires_grad], 1.0)
        for optimizer in chosen:
            optimizer.step()
        accuracy = float(np.nanmean(pair_accuracy(scores.detach().numpy(), gold)))
        records.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
    trained = trained.merge_and_unload() if lora_rank else trained
    return trained.eval(), records


def _batches(
    data: Sequence[Responses], prompts_per_batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One epoch of (ids, lengths, gold), prompts bucketed by length; a batch never mixes two data sets.

    Prompts whose responses all have equal gold teach nothing and are left out.
    """
    epoch = []
    for responses in data:
        informative = np.flatnonzero(responses.gold.max(1) > responses.gold.min(1))
        ids, lengths = responses.sequences()
        ids, lengths, gold = ids[informative], lengths[informative], responses.gold[informative]
        for index in lm.bucketed_batches(lengths.max(1), prompts_per_batch, rng):
            flat = lengths[index].reshape(-1)
            epoch.append((ids[index].reshape(len(flat), -1), flat, gold[index]))
    for position in rng.permutation(len(epoch)):
        yield epoch[position]


def _with_adapters(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    config = models.lora_config(rank, 2.0 * rank)
    config.modules_to_save = ["score"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config, adapter_name=models.REWARD)


def _optimizers(model: nn.Module, lr: float, muon_lr: float, lora_rank: int) -> list[torch.optim.Optimizer]:
    if lora_rank:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    return lm.optimizers(model, lr, muon_lr)
