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
from rlhfscale.data.documents import bucketed_batches
from rlhfscale.data.responses import Responses


def bradley_terry(scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """``-log sigmoid(score_i - score_j)``, a mean over all pairs within a prompt in which i's gold exceeds j's.

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


def num_pairs(gold: np.ndarray) -> int:
    """Number of pairs with unequal gold within a prompt; gold is [prompt, sample]."""
    return int((gold[:, :, None] > gold[:, None, :]).sum())


class OutcomeRewardModel:
    """A reward model, frozen: one scalar for a prompt and its response.

    Args:
        model: a sequence-classification model with one output.
        readout: where the score head is read. ``last``: at the last token, which is the end-of-sequence token of a
            finished response (Ouyang et al. 2022). ``sum``: at every response token, summed; the model is still
            trained on whole responses only, but a wrong token can be judged where it stands.

    Attributes:
        mean, std: of the scores over training responses, for normalisation.
    """

    def __init__(self, model: PreTrainedModel, readout: str):
        self.model, self.readout = model.eval().requires_grad_(False), readout
        self.mean, self.std = 0.0, 1.0

    def calibrate(self, scores: np.ndarray) -> None:
        """Set the mean and standard deviation that ``score(normalise=True)`` removes.

        Raises ValueError where all scores are equal: such a model says nothing.
        """
        self.mean, self.std = float(scores.mean()), float(scores.std())
        if not self.std > 0:
            raise ValueError("the reward model gives every response the same score; train it longer")

    def save(self, folder: Path) -> None:
        """Write a plain sequence-classification folder, with ``reward.json``: readout, mean, std."""
        models.save_model(self.model, folder)
        about = {"readout": self.readout, "mean": self.mean, "std": self.std}
        (folder / "reward.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: Path) -> "OutcomeRewardModel":
        about = json.loads((folder / "reward.json").read_text())
        reward = cls(models.load_scorer(folder), about["readout"])
        reward.mean, reward.std = about["mean"], about["std"]
        return reward

    @torch.no_grad()
    def score(
        self,
        ids: np.ndarray,
        prompt_lengths: np.ndarray,
        lengths: np.ndarray,
        *,
        normalise: bool = False,
        batch_size: int = 512,
    ) -> np.ndarray:
        """Score whole sequences, in batches of similar length.

        Args:
            ids: int64 [sequence, length], prompt and response joined, padded on the right.
            prompt_lengths: int64 [sequence], tokens of the prompt.
            lengths: int64 [sequence], tokens of prompt and response; above prompt_lengths.
            normalise: shift and scale to the training responses' mean 0 and standard deviation 1.
            batch_size: sequences scored together.

        Returns:
            float32 [sequence].
        """
        first, inverse = distinct(ids, lengths)
        scores = np.zeros(len(first), np.float32)
        order = np.argsort(lengths[first], kind="stable")
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            index = first[rows]
            batch = sequence_scores(self.model, ids[index], prompt_lengths[index], lengths[index], self.readout)
            scores[rows] = batch.numpy()
        return (scores[inverse] - self.mean) / self.std if normalise else scores[inverse]

    def score_responses(self, responses: Responses) -> np.ndarray:
        """Raw scores, float32 [prompt, sample]."""
        ids, lengths = responses.sequences()
        prompts = np.repeat(responses.prompt_lengths.astype(np.int64), responses.num_samples)
        return self.score(ids.reshape(-1, ids.shape[2]), prompts, lengths.reshape(-1)).reshape(lengths.shape)


def distinct(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ, so that equal sequences are computed once: responses to one prompt often repeat.

    Returns:
        int64 [distinct], the first row of each kind; and int64 [row], which of them each row equals.
    """
    rows = np.column_stack([ids, lengths])
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def sequence_scores(
    model: nn.Module, ids: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray, readout: str
) -> torch.Tensor:
    """float32 [sequence], differentiable; see `OutcomeRewardModel`. The score head runs on the read positions only."""
    batch = torch.from_numpy(ids[:, : int(lengths.max())])
    position = torch.arange(batch.shape[1])
    end = torch.from_numpy(np.asarray(lengths, np.int64))[:, None]
    trunk = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = trunk.model(input_ids=batch, attention_mask=(position < end).long(), use_cache=False).last_hidden_state
    start = end - 1 if readout == "last" else torch.from_numpy(np.asarray(prompt_lengths, np.int64))[:, None]
    read = (position >= start) & (position < end)
    scores = hidden.new_zeros(batch.shape)
    scores[read] = trunk.score(hidden[read]).squeeze(-1)
    return scores.sum(1).float()


def train(
    model: PreTrainedModel,
    data: Sequence[Responses],
    *,
    epochs: int,
    prompts_per_batch: int,
    lr: float,
    muon_lr: float,
    lora_rank: int,
    readout: str,
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
        readout: "last" or "sum", see `OutcomeRewardModel`.
        seed: entropy of the prompts' order and of the adapters.

    Returns:
        the trained model without adapters, and one record of step, loss and accuracy for each step.

    Raises:
        ValueError: no prompt has two responses of unequal gold.
        lm.Diverged: the loss is not finite.
    """
    rng = np.random.default_rng(seed)
    trained = _with_adapters(model, lora_rank, int(rng.integers(2**31))) if lora_rank else model
    trained.train()
    chosen = _optimizers(trained, lr, muon_lr, lora_rank)
    base_rates = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    batches = [batch for _ in range(epochs) for batch in _batches(data, prompts_per_batch, rng)]
    if not batches:
        raise ValueError("data: no prompt has responses of unequal gold, so there is nothing to compare")
    records = []
    for step, (ids, prompt_lengths, lengths, gold) in enumerate(batches):
        factor = lm.warmup_stable_decay(step, len(batches), warmup=20)
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = factor * rate
        first, inverse = distinct(ids, lengths)
        scores = sequence_scores(trained, ids[first], prompt_lengths[first], lengths[first], readout)
        scores = scores[torch.from_numpy(inverse)].view(gold.shape)
        loss = bradley_terry(scores, torch.from_numpy(gold))
        if not torch.isfinite(loss):
            raise lm.Diverged(f"step {step}: reward-model loss is {loss.item()}; lower the learning rate")
        trained.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for p in trained.parameters() if p.requires_grad], 1.0)
        if not torch.isfinite(norm):
            raise lm.Diverged(f"step {step}: reward-model gradient norm is {norm.item()}; lower the learning rate")
        for optimizer in chosen:
            optimizer.step()
        accuracy = float(np.nanmean(pair_accuracy(scores.detach().numpy(), gold)))
        records.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
    trained = trained.merge_and_unload() if lora_rank else trained
    return trained.eval(), records


def _batches(
    data: Sequence[Responses], prompts_per_batch: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """One epoch of (ids, prompt lengths, lengths, gold), prompts bucketed by length; a batch never mixes two data sets.

    Prompts whose responses all have equal gold teach nothing and are left out.
    """
    epoch = []
    for responses in data:
        informative = np.flatnonzero(responses.gold.max(1) > responses.gold.min(1))
        ids, lengths = responses.sequences()
        ids, lengths, gold = ids[informative], lengths[informative], responses.gold[informative]
        prompt_lengths = responses.prompt_lengths[informative].astype(np.int64)
        for index in bucketed_batches(lengths.max(1), prompts_per_batch, rng):
            flat = lengths[index].reshape(-1)
            prompts = np.repeat(prompt_lengths[index], responses.num_samples)
            epoch.append((ids[index].reshape(len(flat), -1), prompts, flat, gold[index]))
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
