"""How good scores and probabilities are: order within prompts, and calibration."""

from dataclasses import dataclass

import numpy as np
import pandas as pd


def pair_accuracy(scores: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """float64 [prompt]: share of a prompt's pairs with unequal gold that the scores order rightly, a tied score
    counting one half; NaN where no pair has unequal gold. Both are [prompt, sample]; NaN gold makes no pair."""
    better = gold[:, :, None] > gold[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    right = (margin > 0) + 0.5 * (margin == 0)
    pairs = better.sum((1, 2))
    return np.where(pairs > 0, (right * better).sum((1, 2)) / np.maximum(pairs, 1), np.nan)


def num_pairs(gold: np.ndarray) -> int:
    """Number of pairs with unequal gold within a prompt; gold is [prompt, sample]."""
    return int((gold[:, :, None] > gold[:, None, :]).sum())


def pair_probabilities(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a Bradley-Terry model claims of each pair with unequal gold within a prompt, and what is true.

    Args:
        scores, gold: float32 [prompt, sample].

    Returns:
        float64 [pair], ``sigmoid(score_i - score_j)`` for i before j; and bool [pair], whether i's gold exceeds j's.
    """
    first, second = np.triu_indices(gold.shape[1], 1)
    unequal = (gold[:, first] > gold[:, second]) | (gold[:, first] < gold[:, second])
    margin = (scores[:, first].astype(np.float64) - scores[:, second])[unequal]
    return sigmoid(margin), (gold[:, first] > gold[:, second])[unequal]


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """float64, ``1 / (1 + exp(-score))`` without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(scores, np.float64)))


@dataclass(frozen=True)
class Calibration:
    """How far stated probabilities are from observed shares.

    Attributes:
        table: one row for each bin: low, high (its bounds), count, probability (mean), correct (share); the last two
            are NaN in an empty bin.
        expected_error: expected calibration error, the mean over samples of ``|probability - correct|`` of their bin
            (Guo et al. 2017).
        brier: mean squared difference of probability and outcome (Brier 1950).
    """

    table: pd.DataFrame
    expected_error: float
    brier: float


def calibration(probabilities: np.ndarray, correct: np.ndarray, num_bins: int = 10) -> Calibration:
    """Compare probabilities with outcomes in bins of equal width; 1.0 falls into the last bin.

    Args:
        probabilities: float [sample] in [0, 1].
        correct: bool or 0/1 [sample].
        num_bins: at least 1.

    Raises:
        ValueError: no sample, unequal shapes, no bin, or a value out of range (names the sample).
    """
    probabilities, correct = np.asarray(probabilities, np.float64), np.asarray(correct, np.float64)
    if probabilities.ndim != 1 or probabilities.shape != correct.shape or not len(correct):
        raise ValueError(f"probabilities {probabilities.shape} and correct {correct.shape} must be equal, not empty")
    if num_bins < 1:
        raise ValueError(f"num_bins: {num_bins} is below 1")
    valid = {"probability": (probabilities >= 0) & (probabilities <= 1), "label": np.isin(correct, (0, 1))}
    for name, good in valid.items():
        if not good.all():
            raise ValueError(f"the {name} of sample {int(np.flatnonzero(~good)[0])} is out of range")
    edges = np.linspace(0, 1, num_bins + 1)
    index = np.clip(np.searchsorted(edges, probabilities, side="right") - 1, 0, num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    filled = np.where(count > 0, count, np.nan)
    stated = np.bincount(index, probabilities, num_bins) / filled
    observed = np.bincount(index, correct, num_bins) / filled
    columns = {"low": edges[:-1], "high": edges[1:], "count": count, "probability": stated, "correct": observed}
    error = float(np.nansum(count * np.abs(stated - observed)) / len(correct))
    return Calibration(pd.DataFrame(columns), error, float(np.mean((probabilities - correct) ** 2)))
