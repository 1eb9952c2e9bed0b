"""An outcome reward model from three kinds of label: comparisons, right or wrong responses, right or wrong steps.

The score of a response is the sum of the head over its tokens, and the logit of a step is the sum over the step's own
tokens. So the score of a response is the sum of the logits of its steps. Comparisons and correctness labels train the
sum, step labels train its parts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import losses, outcome, process, scorer, training
from rlhfscale.rewards.labelled import Labelled, StepLabelled, step_ends


def train(
    model: scorer.Scored,
    responses: Sequence[Labelled],
    steps: Sequence[StepLabelled],
    *,
    step_ids: Sequence[int],
    prompts_per_batch: int,
    responses_per_batch: int,
    tokens_per_micro_batch: int = scorer.TOKENS_PER_MICRO_BATCH,
    **options: Any,
) -> tuple[scorer.Scored, list[dict[str, float]]]:
    """Train a scorer whose readout is ``sum`` (see `outcome.OutcomeRewardModel`).

    Args:
        model: a sequence classifier with one output, trained in place.
        responses: responses with comparisons, correctness labels or both; each batch is of one of them.
        steps: responses with labelled steps; each batch is of one of them.
        step_ids: ids of the tokens that close a step.
        prompts_per_batch: number of prompts (groups) in a batch of ``responses``.
        responses_per_batch: number of responses in a batch of ``steps``.
        tokens_per_micro_batch: tokens computed together, padding included; changes the speed only.
        options: epochs, lr, lora_rank, seed and muon_lr, see `training.run`. An epoch is a pass over all of the data,
            with batches of all kinds in random order.

    Returns:
        the trained model, and one record for each step: step, loss and kind of label (``responses`` or ``steps``).

    Raises:
        ValueError: nothing has a label, or a response has more labels than steps (names it).
        lm.Diverged: the loss or its gradient is not finite.
    """
    scorer.at_least_one(prompts_per_batch=prompts_per_batch, responses_per_batch=responses_per_batch)
    for part in steps:
        process.check_labels(part, step_ids)

    def epoch(rng: np.random.Generator) -> list[Labelled | StepLabelled]:
        batches = [*outcome.batches_of(responses, prompts_per_batch, "both", rng)]
        batches += process.batches_of(steps, responses_per_batch, rng)
        if not batches:
            raise ValueError("data: no response and no step has a label, so there is nothing to learn")
        return [batches[index] for index in rng.permutation(len(batches))]

    def loss_of(trained: scorer.Scored, batch: Labelled | StepLabelled) -> tuple[torch.Tensor, dict[str, float]]:
        if isinstance(batch, StepLabelled):
            logits = step_logits(trained, batch.sequences, step_ids, tokens_per_micro_batch)
            labels = process.flat_labels(batch.labels, step_ends(batch.sequences, step_ids).sum(1))
            return losses.pointwise(logits, torch.from_numpy(labels).to(logits.device)), {"kind": "steps"}
        scores = outcome.sequence_scores(trained, batch.sequences, "sum", tokens_per_micro_batch)
        gold, correct, group = batch.labels(scores.device)
        return losses.multitask(scores, gold, correct, group=group), {"kind": "responses"}

    return training.run(model, epoch, loss_of, **options)


def step_logits(
    model: scorer.Scored, sequences: Sequences, step_ids: Sequence[int], tokens: int = scorer.TOKENS_PER_MICRO_BATCH
) -> torch.Tensor:
    """The head summed over the tokens of each step, float32 [step], row by row; the sum of a row is its score."""
    where, ends = outcome.read_at(sequences, "sum"), step_ends(sequences, step_ids)
    # a response's last token closes its last step, so the count goes on from row to row
    step = np.concatenate([[0], ends[where].cumsum()[:-1]])
    read = scorer.read(model, sequences, where, tokens)
    return read.new_zeros(int(step[-1]) + 1).index_add(0, torch.from_numpy(step).to(read.device), read)
