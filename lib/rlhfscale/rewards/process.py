"""The process reward model: the probability that each step of a response is right, read where the step ends.

Uesato et al. 2022 and Lightman et al. 2023 train such models on labels of steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhfscale.models.documents import bucketed_batches
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import losses, scorer, training
from rlhfscale.rewards.base import chosen
from rlhfscale.rewards.labelled import StepLabelled, step_ends
from rlhfscale.rewards.metrics import sigmoid

AGGREGATES = {"last": lambda p: p[-1], "min": np.min, "product": np.prod}


class ProcessRewardModel(scorer.Scorer):
    """A frozen process reward model.

    Args:
        model: a decoder-only sequence-classification model with one output, with or without PEFT adapters. It is frozen
            in place, and its score head becomes float32. The head's output at the end of a step is the logit that the
            step is right.
        tokenizer: the model's tokenizer. None: the ids of any sequence are taken as the model's own.
        step_ids: ids of the tokens that close a step, see `find_step_ids`. The last token of a response always closes
            its last step.
        aggregate: how the score of a response follows from the probabilities of its steps: that of the ``last`` step
            (Snell et al. 2024), their ``min``, or their ``product`` (both in Lightman et al. 2023, appendix F).
        options: mean and std of the scores over training responses, for `normalised`; tokens_per_micro_batch, the
            tokens computed together, which changes the speed only.
    """

    _options = ("step_ids", "aggregate")

    def __init__(
        self,
        model: scorer.Scored,
        tokenizer: PreTrainedTokenizerBase | None,
        step_ids: Sequence[int],
        aggregate: str = "last",
        **options: Any,
    ):
        self.aggregate = chosen("aggregate", aggregate, tuple(AGGREGATES))
        self.step_ids = _step_ids(step_ids)
        super().__init__(model, tokenizer, **options)

    def score(self, sequences: Sequences) -> np.ndarray:
        """The aggregated probability of each response, float32 [sequence] in [0, 1]. For errors see `step_scores`."""
        combine = AGGREGATES[self.aggregate]
        return np.array([combine(steps) for steps in self.step_scores(sequences)], np.float32)

    @torch.no_grad()
    def step_scores(self, sequences: Sequences) -> list[np.ndarray]:
        """The probability that each step is right: for each sequence float64 [step], with at least one step.

        Sequences of another tokenizer are encoded again, see `scorer.Scorer.own`. Raises ValueError for an empty
        response.
        """
        if not len(sequences):
            return []
        sequences = self.own(sequences)
        first, inverse = scorer.distinct(sequences)
        kinds = sequences[first]
        ends = step_ends(kinds, self.step_ids)
        logits = scorer.read(self.model, kinds, ends, self.tokens_per_micro_batch).cpu().numpy()
        steps = np.split(sigmoid(logits), ends.sum(1).cumsum()[:-1])
        return [steps[kind] for kind in inverse]


def find_step_ids(tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[int, ...]:
    """Ids of all tokens whose text contains the separator; for a newline also the token of two newlines.

    Raises ValueError where no token contains it.
    """
    ids = sorted(tokenizer.get_vocab().values())
    texts = tokenizer.batch_decode([[index] for index in ids])
    found = tuple(index for index, text in zip(ids, texts, strict=True) if separator in text)
    if not found:
        raise ValueError(f"separator: no token of the tokenizer holds {separator!r}")
    return found


def train(
    model: scorer.Scored,
    data: Sequence[StepLabelled],
    *,
    step_ids: Sequence[int],
    responses_per_batch: int,
    tokens_per_micro_batch: int = scorer.TOKENS_PER_MICRO_BATCH,
    **options: Any,
) -> tuple[scorer.Scored, list[dict[str, float]]]:
    """Train a scorer on the labels of steps by `losses.pointwise`.

    Args:
        model: a sequence classifier with one output, trained in place.
        data: responses with labelled steps, in the model's tokens. A batch never mixes two of them.
        step_ids: ids of the tokens that close a step.
        responses_per_batch: number of responses in a batch.
        tokens_per_micro_batch: tokens computed together, padding included; changes the speed only.
        options: epochs, lr, lora_rank, seed, muon_lr and merge, see `training.run`.

    Returns:
        the trained model, and one record for each step: step, loss and accuracy (the share of steps whose score has the
        right sign).

    Raises:
        ValueError: no step has a label, or a response has more labels than steps (names it).
        lm.Diverged: the loss or its gradient is not finite.
    """
    step_ids = _step_ids(step_ids)
    scorer.at_least_one(responses_per_batch=responses_per_batch, tokens_per_micro_batch=tokens_per_micro_batch)
    for part in data:
        check_labels(part, step_ids)
    if all(np.isnan(part.labels).all() for part in data):
        raise ValueError("data: no step has a label, so there is nothing to learn")

    def loss_of(trained: scorer.Scored, batch: StepLabelled) -> tuple[torch.Tensor, dict[str, float]]:
        ends = step_ends(batch.sequences, step_ids)
        scores = scorer.read(trained, batch.sequences, ends, tokens_per_micro_batch)
        labels = torch.from_numpy(flat_labels(batch.labels, ends.sum(1))).to(scores.device)
        right = ((scores > 0) == (labels > 0.5))[~torch.isnan(labels)]
        return losses.pointwise(scores, labels), {"accuracy": right.float().mean().item()}

    return training.run(model, lambda rng: batches_of(data, responses_per_batch, rng), loss_of, **options)


def batches_of(data: Sequence[StepLabelled], size: int, rng: np.random.Generator) -> Iterator[StepLabelled]:
    """The batches of one epoch, in random order: responses of similar length; those without a label are left out."""
    epoch = []
    for part in data:
        part = part[np.flatnonzero(~np.isnan(part.labels).all(1))]
        epoch += [part[index] for index in bucketed_batches(part.sequences.lengths, size, rng)]
    for position in rng.permutation(len(epoch)):
        yield epoch[position]


def flat_labels(labels: np.ndarray, num_steps: np.ndarray) -> np.ndarray:
    """The labels of all steps, row by row, float32 [step]; NaN where a row has fewer labels than steps."""
    width = max(labels.shape[1], int(num_steps.max()))
    labels = np.pad(labels, ((0, 0), (0, width - labels.shape[1])), constant_values=np.nan)
    return labels[np.arange(width) < num_steps[:, None]].astype(np.float32)


def check_labels(data: StepLabelled, step_ids: Sequence[int]) -> None:
    """Raise ValueError for the first response that has labels for more than its steps."""
    num_steps = step_ends(data.sequences, step_ids).sum(1)
    beyond = (~np.isnan(data.labels) & (np.arange(data.labels.shape[1]) >= num_steps[:, None])).any(1)
    if beyond.any():
        row = int(np.flatnonzero(beyond)[0])
        raise ValueError(f"response {row} has labels for more than its {num_steps[row]} steps")


def _step_ids(step_ids: Sequence[int]) -> tuple[int, ...]:
    if not len(step_ids):
        raise ValueError("step_ids: name at least one token that closes a step")
    return tuple(int(index) for index in step_ids)
