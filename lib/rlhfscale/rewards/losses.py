"""The losses of reward models. Scores are float32 logits. A label that is NaN is missing and contributes nothing."""

import torch
import torch.nn.functional as F


def by_group(values: torch.Tensor, group: torch.Tensor, fill: float) -> torch.Tensor:
    """Lay out values by group, in order: [sequence] -> [group, longest group].

    Args:
        values: [sequence].
        group: int64 [sequence]; values with the same number belong together.
        fill: what stands behind the members of a shorter group.
    """
    _, row, counts = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(row, stable=True)
    ends = counts.cumsum(0)
    column = torch.arange(len(group), device=group.device) - (ends - counts)[row[order]]
    laid_out = values.new_full((len(counts), int(counts.max())), fill)
    laid_out[row[order], column] = values[order]
    return laid_out


def _pairs(
    scores: torch.Tensor, gold: torch.Tensor, group: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and gold as [prompt, sample], and whether the gold of i exceeds that of j, bool [prompt, i, j]."""
    if group is not None:
        scores, gold = by_group(scores, group, 0.0), by_group(gold, group, float("nan"))
    better = gold[:, :, None] > gold[:, None, :]
    if not better.any():
        raise ValueError("gold: no prompt has responses of unequal gold, so there is nothing to compare")
    return scores, gold, better


def bradley_terry(
    scores: torch.Tensor, gold: torch.Tensor, *, group: torch.Tensor | None = None, margin: float = 0.0
) -> torch.Tensor:
    """The negative log-likelihood of comparisons under Bradley and Terry's model (1952), a scalar.

    ``-log sigmoid(score_i - score_j - margin (gold_i - gold_j))``, a mean over all pairs within a prompt in which the
    gold of i exceeds that of j. All pairs of a prompt are used from one forward pass (Ouyang et al. 2022, eq. 1). With
    a margin, a pair further apart in gold must be further apart in score (Touvron et al. 2023, eq. 2).

    Args:
        scores: float32 [prompt, sample], or [sequence] with ``group``.
        gold: float32, same shape; ties and NaN make no pair.
        group: int64 [sequence], the prompt of each response.
        margin: margin in score for each unit of gold.

    Raises:
        ValueError: there is no pair.
    """
    scores, gold, better = _pairs(scores, gold, group)
    difference = scores[:, :, None] - scores[:, None, :]
    if margin:
        difference = difference - margin * (gold[:, :, None] - gold[:, None, :])
    return -F.logsigmoid(difference[better]).mean()


def centring(scores: torch.Tensor, gold: torch.Tensor, *, group: torch.Tensor | None = None) -> torch.Tensor:
    """``(score_i + score_j)^2``, a mean over the pairs of `bradley_terry`, with the same arguments.

    It pulls scores towards zero, because comparisons alone do not determine their mean (Eisenstein et al. 2023, eq. 2).
    """
    scores, _, better = _pairs(scores, gold, group)
    return (scores[:, :, None] + scores[:, None, :])[better].square().mean()


def pointwise(scores: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of ``sigmoid(score)`` against correctness, a mean over labelled responses or steps.

    It is the loss of outcome models that learn from correctness, and of process models, whose scores are read at the
    ends of steps (Uesato et al. 2022; Lightman et al. 2023, section 2.6).

    Args:
        scores: float32, any shape.
        correct: float32, same shape, 0 or 1; NaN: no label.

    Raises:
        ValueError: there is no label, or one is neither 0 nor 1.
    """
    labelled = ~torch.isnan(correct)
    labels = correct[labelled].to(scores.dtype)
    if not len(labels):
        raise ValueError("correct: no response has a label")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("correct: a label is neither 0 nor 1")
    return F.binary_cross_entropy_with_logits(scores[labelled], labels)


def multitask(
    scores: torch.Tensor,
    gold: torch.Tensor,
    correct: torch.Tensor,
    *,
    group: torch.Tensor | None = None,
    pairs_weight: float = 1.0,
    pointwise_weight: float = 1.0,
    margin: float = 0.0,
    centring_weight: float = 0.0,
) -> torch.Tensor:
    """One loss for comparisons and for correctness labels.

    It is ``pairs_weight`` times (`bradley_terry` plus ``centring_weight`` times `centring`) plus ``pointwise_weight``
    times `pointwise`. Hou et al. 2024 (arXiv 2412.06000) train reward models on both kinds of label; the weighted sum
    is our reading. A task without labels among these responses, or of weight 0, contributes nothing.

    Args:
        scores, gold, correct: float32 [prompt, sample], or [sequence] with ``group``.

    Raises:
        ValueError: no task of positive weight has labels.
    """
    total = None
    if pairs_weight and has_pairs(gold, group):
        total = pairs_weight * bradley_terry(scores, gold, group=group, margin=margin)
        if centring_weight:
            total = total + pairs_weight * centring_weight * centring(scores, gold, group=group)
    if pointwise_weight and not torch.isnan(correct).all():
        labelled = pointwise_weight * pointwise(scores, correct)
        total = labelled if total is None else total + labelled
    if total is None:
        raise ValueError("no response has a label of a task of positive weight")
    return total


def has_pairs(gold: torch.Tensor, group: torch.Tensor | None = None) -> bool:
    """Whether two responses of some prompt have unequal gold."""
    gold = gold if group is None else by_group(gold, group, float("nan"))
    return bool((gold[:, :, None] > gold[:, None, :]).any())
