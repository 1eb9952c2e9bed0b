"""How well scores order the responses to a prompt, and probabilities from scores."""

import numpy as np


def pair_accuracy(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Share of the pairs of a prompt that the scores order as gold does; a tied score counts one half.

    Args:
        scores: float [prompt, sample].
        gold: float [prompt, sample]; a pair needs unequal gold, and NaN makes no pair.

    Returns:
        float64 [prompt]; NaN where a prompt has no pair.
    """
    better = gold[:, :, None] > gold[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    right = (margin > 0) + 0.5 * (margin == 0)
    pairs = better.sum((1, 2))
    return np.where(pairs > 0, (right * better).sum((1, 2)) / np.maximum(pairs, 1), np.nan)


def num_pairs(gold: np.ndarray) -> int:
    """Number of pairs of unequal gold within a prompt, over all prompts; gold is [prompt, sample]."""
    return int((gold[:, :, None] > gold[:, None, :]).sum())


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """``1 / (1 + exp(-score))`` as float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(scores, np.float64)))
