"""One outcome reward model from three kinds of label: comparisons, right or wrong responses, and right or wrong steps.

The score of a response is the sum of the head over its tokens. A step's logit is the sum over the step's own tokens,
so a response's score is the sum of its steps' logits: comparisons and correctness labels teach the sum, step labels its
parts.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import losses, outcome, process, scorer
from rlhfscale.rewards.labelled import Labelled, StepLabelled, step_ends


def train(
    model: scorer.Scored,
    responses: Sequence[Labelled],
    steps: Sequence[StepLabelled],
    *,
    step_ids: Sequence[int],
    epochs: int,
    prompts_per_batch: int,
    responses_per_batch: int,
    lr: float,
    lora_rank: int,
    seed: Sequence[int],
    muon_lr: float | None = None,
    tokens_per_micro_batch: int = scorer.TOKENS_PER_MICRO_BATCH,
) -> tuple[scorer.Scored, list[dict[str, float]]]:
    """Train a scorer whose score is read as ``sum`` (see `outcome.OutcomeRewardModel`).

    Args:
        model: e.g. from ``models.load_scorer(..., init_seed=...)``; trained in place.
        responses: responses with comparisons, correctness labels or both; each batch is of one of them.
        steps: responses with labelled steps; each batch is of one of them.
        step_ids: ids of the tokens that close a step.
        epochs: passes over all of it, batches of all kinds in random order.
        prompts_per_batch: prompts (groups) in a batch of ``responses``; responses_per_batch: of ``steps``.
        lr, lora_rank, seed, muon_lr, tokens_per_micro_batch: as in `outcome.train`.

    Returns:
        the trained model, and one record of step, loss and kind of label (``responses`` or ``steps``) for each step.

    Raises:
        ValueError: nothing has a label, or a response has more labels than steps (names it).
        lm.Diverged: the loss or its gradient is not finite.
    """
    scorer.at_least_one(epochs=epochs, prompts_per_batch=prompts_per_batch, responses_per_batch=responses_per_batch)
    for part in steps:
        process.check_labels(part, step_ids)
    rng = np.random.default_rng(seed)
    trained = scorer.prepare(model, lora_rank, True, rng)
    optimizers = scorer.optimizers(trained, lr, muon_lr)
    batches: list[Labelled | StepLabelled] = []
    for _ in range(epochs):
        epoch = [*outcome.batches_of(responses, prompts_per_batch, "both", rng)]
        epoch += process.batches_of(steps, responses_per_batch, rng)
        batches += [epoch[index] for index in rng.permutation(len(epoch))]
    if not batches:
        raise ValueError("data: no response and no step has a label, so there is nothing to learn")

    def loss_of(batch: Labelled | StepLabelled) -> tuple[torch.Tensor, dict[str, float]]:
        if isinstance(batch, StepLabelled):
            logits = step_logits(trained, batch.sequences, step_ids, tokens_per_micro_batch)
            labels = process.flat_labels(batch.labels, step_ends(batch.sequences, step_ids).sum(1))
            return losses.process(logits, torch.from_numpy(labels).to(logits.device)), {"kind": "steps"}
        scores = outcome.sequence_scores(trained, batch.sequences, "sum", tokens_per_micro_batch)
        gold, correct, group = (torch.from_numpy(x).to(scores.device) for x in (batch.gold, batch.correct, batch.group))
        return losses.multitask(scores, gold, correct, group=group), {"kind": "responses"}

    records = scorer.fit(trained, batches, loss_of, optimizers)
    return scorer.finish(trained, True), records


def step_logits(
    model: scorer.Scored, sequences: Sequences, step_ids: Sequence[int], tokens: int = scorer.TOKENS_PER_MICRO_BATCH
) -> torch.Tensor:
    """float32 [step], row by row: the head summed over each step's tokens; a row's sum is its score."""
    where, ends = outcome.read_at(sequences, "sum"), step_ends(sequences, step_ids)
    # a response's last token closes its last step, so the count goes on from row to row
    step = np.concatenate([[0], ends[where].cumsum()[:-1]])
    read = scorer.read(model, sequences, where, tokens)
    return read.new_zeros(int(step[-1]) + 1).index_add(0, torch.from_numpy(step).to(read.device), read)
