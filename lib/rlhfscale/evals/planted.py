"""Judgments whose truth is known: models of chosen strength and length before a judge that likes long answers.

They show what the metrics do where no real judgments are at hand, and whether their intervals hold what they promise.
"""

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from rlhfscale.evals.alpaca_eval import Annotations, gamed_rows, lc_interval, length_controlled, length_feature
from rlhfscale.evals.logistic import Rows

DIFFICULTY_WEIGHT = 0.8
"""Of an instruction's difficulty, which is standard normal; as large as the published fits find it."""
LENGTH_WEIGHT = -1.5
"""Of the length feature, negative for a judge that likes long answers; published fits are between -1.1 and -2.0."""
CHARS = 2000.0
"""Mean length of the baseline's answers."""
SPREAD = 800.0
"""Standard deviation of the difference in length."""
C = 2.782559402207126
"""What most published fits choose."""


def strength(win_rate: float) -> float:
    """The strength (bias of the logistic model) whose win rate in percent at equal length is ``win_rate``."""
    return float(brentq(lambda bias: expected_win_rate(bias) - win_rate, -20, 20))


def expected_win_rate(bias: float) -> float:
    """100 * E sigmoid(bias + DIFFICULTY_WEIGHT * difficulty) over standard normal difficulties (Gauss and Hermite)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float(100 * (weights * expit(bias + DIFFICULTY_WEIGHT * nodes)).sum() / weights.sum())


def annotations(rng: np.random.Generator, *, win_rate: float, extra_chars: float, num_instructions: int) -> Annotations:
    """One model's judgments against the baseline; each is won or lost.

    Args:
        win_rate: percent, at equal length.
        extra_chars: by which the model's answers are longer on average.
    """
    difficulty = rng.normal(size=num_instructions)
    len_baseline = CHARS + rng.normal(scale=300.0, size=num_instructions)
    len_model = np.maximum(1.0, len_baseline + rng.normal(extra_chars, SPREAD, num_instructions)).round()
    logits = strength(win_rate) + DIFFICULTY_WEIGHT * difficulty
    logits = logits + LENGTH_WEIGHT * length_feature(len_baseline, len_model)
    wins = rng.random(num_instructions) < expit(logits)
    return Annotations(1.0 + wins, len_baseline, len_model, difficulty)


def gamed(rng: np.random.Generator, *, num_instructions: int) -> Rows:
    """Regularising rows of the same judge: a concise and a verbose rewording of the baseline."""
    shift = np.repeat([1.0, -1.0], num_instructions)
    delta = rng.normal(shift, 1.0)
    return gamed_rows(expit(LENGTH_WEIGHT * np.tanh(delta)), delta, np.zeros(len(delta)))


def coverage(
    *,
    seed: int,
    win_rate: float,
    extra_chars: float,
    num_instructions: int,
    num_simulations: int,
    num_refits: int,
) -> dict[str, float]:
    """Share of simulated evaluations whose 95% interval holds the planted win rate.

    Returns:
        ``refit``: with intervals that refit in each draw; ``published``: with 1.96 published standard errors.
    """
    held = {"refit": 0, "published": 0}
    about = {"num_instructions": num_instructions}
    for simulation in range(num_simulations):
        rng = np.random.default_rng((seed, simulation))
        drawn = annotations(rng, win_rate=win_rate, extra_chars=extra_chars, **about)
        regular = gamed(rng, **about)
        interval = lc_interval(drawn, regular, C=C, rng=rng, num_draws=num_refits)
        held["refit"] += interval.low <= win_rate <= interval.high
        fitted = length_controlled(drawn, regular, C=C)
        held["published"] += abs(fitted.win_rate - win_rate) <= 1.96 * fitted.standard_error
    return {name: count / num_simulations for name, count in held.items()}
