"""The outcome reward model: one score for a whole response, learned from comparisons, correctness labels, or both."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.documents import bucketed_batches
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import scorer, training
from rlhfscale.rewards.base import chosen
from rlhfscale.rewards.labelled import Labelled
from rlhfscale.rewards.losses import by_group, multitask
from rlhfscale.rewards.metrics import num_pairs, pair_accuracy

__all__ = ["OutcomeRewardModel", "num_pairs", "pair_accuracy", "sequence_scores", "train"]

READOUTS = ("last", "sum")
LOSSES = ("pairs", "pointwise", "both")


class OutcomeRewardModel(scorer.Scorer):
    """A frozen reward model that gives one score to a prompt and its response.

    Args:
        model: a decoder-only sequence-classification model with one output, with or without PEFT adapters. It is frozen
            in place, and its score head becomes float32.
        tokenizer: the model's tokenizer. None: the ids of any sequence are taken as the model's own.
        readout: where the score head is read. ``last``: at the last token, which is the end-of-sequence token of a
            finished response (Ouyang et al. 2022). ``sum``: at every response token, summed. The model is still trained
            on whole responses only, but it can judge a wrong token where it stands.
        options: mean and std of the scores over training responses, for `normalised`; tokens_per_micro_batch, the
            tokens computed together, which changes the speed only.
    """

    _options = ("readout",)

    def __init__(
        self,
        model: scorer.Scored,
        tokenizer: PreTrainedTokenizerBase | None = None,
        readout: str = "last",
        **options: Any,
    ):
        self.readout = chosen("readout", readout, READOUTS)
        super().__init__(model, tokenizer, **options)

    @torch.no_grad()
    def score(self, sequences: Sequences) -> np.ndarray:
        """Raw scores, float32 [sequence]; equal sequences are computed once.

        Sequences of another tokenizer are encoded again, see `scorer.Scorer.own`. Raises ValueError for an empty
        response.
        """
        if not len(sequences):
            return np.zeros(0, np.float32)
        sequences = self.own(sequences)
        first, inverse = scorer.distinct(sequences)
        scores = sequence_scores(self.model, sequences[first], self.readout, self.tokens_per_micro_batch)
        return scores.cpu().numpy()[inverse]


def sequence_scores(
    model: scorer.Scored, sequences: Sequences, readout: str, tokens: int = scorer.TOKENS_PER_MICRO_BATCH
) -> torch.Tensor:
    """Differentiable scores, float32 [sequence]. For the readout see `OutcomeRewardModel`; also `scorer.read_head`."""
    where = read_at(sequences, readout)
    return by_sequence(scorer.read(model, sequences, where, tokens), where)


def read_at(sequences: Sequences, readout: str) -> np.ndarray:
    """The tokens at which the score head is read, bool [sequence, length]."""
    position = np.arange(sequences.ids.shape[1])
    end = sequences.lengths[:, None]
    return (position >= (end - 1 if readout == "last" else sequences.prompt_lengths[:, None])) & (position < end)


def by_sequence(read: torch.Tensor, where: np.ndarray) -> torch.Tensor:
    """The sum of what was read at the positions ``where`` of each sequence, float32 [sequence]."""
    by_token = read.new_zeros(where.shape)
    by_token[torch.from_numpy(where).to(read.device)] = read
    return by_token.sum(1)


def train(
    model: scorer.Scored,
    data: Sequence[Labelled],
    *,
    prompts_per_batch: int,
    readout: str,
    loss: str = "pairs",
    margin: float = 0.0,
    centring: float = 0.0,
    pointwise_weight: float = 1.0,
    tokens_per_micro_batch: int = scorer.TOKENS_PER_MICRO_BATCH,
    **options: Any,
) -> tuple[scorer.Scored, list[dict[str, float]]]:
    """Train a scorer on comparisons within each prompt, on correctness labels, or on both.

    Args:
        model: a sequence classifier with one output, trained in place.
        data: labelled responses in the model's tokens. A batch never mixes two of them (`Labelled.concat` does).
        prompts_per_batch: number of prompts (groups) in a batch, each with all its responses.
        readout: "last" or "sum", see `OutcomeRewardModel`.
        loss: ``pairs``: Bradley-Terry on all pairs of unequal gold within a prompt; ``pointwise``: binary
            cross-entropy on ``correct``; ``both``: their sum, see `losses.multitask`.
        margin: margin of the pairs, in score for each unit of gold. centring: weight of `losses.centring` over the
            pairs. Both need pairs.
        pointwise_weight: weight of the pointwise loss in ``both``.
        tokens_per_micro_batch: tokens computed together, padding included; changes the speed only.
        options: epochs, lr, lora_rank, seed, muon_lr and merge, see `training.run`.

    Returns:
        the trained model, and one record of step, loss and accuracy for each step: the share of rightly ordered pairs,
        for ``pointwise`` the share of right signs, which ``both`` has as label_accuracy (NaN without such labels).

    Raises:
        ValueError: an unknown name or an option without use; no prompt has labels of the kind asked for.
        lm.Diverged: the loss or its gradient is not finite.
    """
    chosen("readout", readout, READOUTS)
    scorer.at_least_one(prompts_per_batch=prompts_per_batch, tokens_per_micro_batch=tokens_per_micro_batch)
    objective = _objective(loss, margin, centring, pointwise_weight)
    if not any(_useful(part, loss).any() for part in data):
        wanted = {"pairs": "responses of unequal gold", "pointwise": "a correctness label", "both": "labels"}[loss]
        raise ValueError(f"data: no prompt has {wanted}, so there is nothing to learn")

    def loss_of(trained: scorer.Scored, batch: Labelled) -> tuple[torch.Tensor, dict[str, float]]:
        first, inverse = scorer.distinct(batch.sequences)
        scores = sequence_scores(trained, batch.sequences[first], readout, tokens_per_micro_batch)
        scores = scores[torch.from_numpy(inverse).to(scores.device)]
        gold, correct, group = batch.labels(scores.device)
        return objective(scores, gold, correct, group=group), _accuracies(scores, gold, correct, group, loss)

    return training.run(model, lambda rng: batches_of(data, prompts_per_batch, loss, rng), loss_of, **options)


def _objective(loss: str, margin: float, centring: float, pointwise_weight: float) -> Callable[..., torch.Tensor]:
    chosen("loss", loss, LOSSES)
    if loss == "pointwise" and (margin or centring):
        raise ValueError("margin and centring are of pairs: without use in loss='pointwise'")
    if loss != "both" and pointwise_weight != 1:
        raise ValueError(f"pointwise_weight: without use in loss={loss!r}")
    if margin < 0 or centring < 0 or not pointwise_weight > 0:
        raise ValueError("margin and centring must be at least 0, pointwise_weight above 0")
    weights = {"pairs": (1.0, 0.0), "pointwise": (0.0, 1.0), "both": (1.0, pointwise_weight)}[loss]
    return partial(
        multitask, pairs_weight=weights[0], pointwise_weight=weights[1], margin=margin, centring_weight=centring
    )


def _useful(data: Labelled, loss: str) -> np.ndarray:
    """Which responses have a label that the loss asks for, bool [sequence]."""
    compared, labelled = data.compared(), ~np.isnan(data.correct)
    return {"pairs": compared, "pointwise": labelled, "both": compared | labelled}[loss]


def batches_of(
    data: Sequence[Labelled], prompts_per_batch: int, loss: str, rng: np.random.Generator
) -> Iterator[Labelled]:
    """The batches of one epoch, in random order: groups of similar longest sequence, numbered from 0 in each batch.

    Responses without a label that the loss asks for are left out; for ``pairs`` those of a prompt whose responses all
    have the same gold.
    """
    epoch = []
    for part in data:
        part = part[np.flatnonzero(_useful(part, loss))]
        _, row, counts = np.unique(part.group, return_inverse=True, return_counts=True)
        members = np.split(np.argsort(row, kind="stable"), counts.cumsum()[:-1])
        longest = np.zeros(len(counts), np.int64)
        np.maximum.at(longest, row, part.sequences.lengths)
        for index in bucketed_batches(longest, prompts_per_batch, rng):
            batch = part[np.concatenate([members[group] for group in index])]
            numbered = np.repeat(np.arange(len(index)), counts[index])
            epoch.append(Labelled(batch.sequences, numbered, batch.gold, batch.correct))
    for position in rng.permutation(len(epoch)):
        yield epoch[position]


def _accuracies(
    scores: torch.Tensor, gold: torch.Tensor, correct: torch.Tensor, group: torch.Tensor, loss: str
) -> dict[str, float]:
    scores = scores.detach()
    right = ((scores > 0) == (correct > 0.5))[~torch.isnan(correct)].float().mean().item()
    if loss == "pointwise":
        return {"accuracy": right}
    laid_out = by_group(scores, group, 0.0).cpu().numpy(), by_group(gold, group, float("nan")).cpu().numpy()
    by_prompt = pair_accuracy(*laid_out)
    by_prompt = by_prompt[~np.isnan(by_prompt)]
    ordered = {"accuracy": float(by_prompt.mean()) if len(by_prompt) else float("nan")}
    return ordered | {"label_accuracy": right} if loss == "both" else ordered
