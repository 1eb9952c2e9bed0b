"""Logistic regression as liblinear fits it, to the last digit: what AlpacaEval's published weights were fitted with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

TOLERANCE = 1e-4
"""At which the published fits were stopped."""

_LIBLINEAR_SEED = 843828734
"""numpy.random.RandomState(123).randint(2**31 - 1)"""


@dataclass(frozen=True)
class Rows:
    """Training rows of the logistic model: features float64 [row, 3] (length, difficulty, bias), target in [0, 1],
    weight > 0."""

    features: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    def __getitem__(self, index: Any) -> "Rows":
        return Rows(self.features[index], self.target[index], self.weight[index])

    def __len__(self) -> int:
        return len(self.target)


def loss(rows: Rows, weights: np.ndarray) -> np.ndarray:
    """Cross-entropy of each row in nats, without its weight."""
    z = rows.features @ weights
    return np.logaddexp(0.0, z) - rows.target * z


def fit(rows: Rows, C: float, start: np.ndarray | None = None, tolerance: float = TOLERANCE) -> np.ndarray:
    """Minimise |w|_1 + C * sum of weighted cross-entropies, as liblinear does, without its doubled rows.

    Yuan et al. (2012, JMLR 13:1999-2030): Newton steps, each an L1-penalised quadratic that coordinate descent solves
    more and more exactly, with a line search. The published win rates were stopped at a tolerance of 1e-4, which moves
    them by up to 0.01 points from the optimum; 1e-10 gives the optimum.

    Args:
        start: float64 [feature], where to begin; None is 0, as for the published numbers.
        tolerance: stop once the optimality conditions are violated by this share of the violation at 0.

    Returns:
        float64 [feature].
    """
    features, scale = rows.features, C * rows.weight
    num_features = features.shape[1]
    # liblinear scales its tolerance by the rarer label's share of the rows: each row stands twice, once with each
    # label, unless its target is 0 or 1
    ones, zeros = int((rows.target > 0).sum()), int((rows.target < 1).sum())
    tolerance *= max(min(ones, zeros), 1) / (ones + zeros)
    at_zero = features.T @ (scale * (0.5 - rows.target))
    at_start = np.maximum(np.abs(at_zero) - 1, 0).sum()
    weights = np.zeros(num_features) if start is None else np.array(start, float)

    def objective(w: np.ndarray) -> float:
        return float(np.abs(w).sum() + scale @ loss(rows, w))

    draw, order = _liblinear_draws(), list(range(num_features))
    value, accuracy = objective(weights), 1.0
    for _ in range(100):
        q = expit(features @ weights)
        gradient = features.T @ (scale * (q - rows.target))
        if _violation(weights, gradient) <= tolerance * at_start:
            break
        hessian = (features * (scale * q * (1 - q))[:, None]).T @ features
        step, sweeps = _coordinate_descent(weights, gradient, hessian, accuracy * at_start, order, draw)
        slope = gradient @ step + np.abs(weights + step).sum() - np.abs(weights).sum()
        for halvings in range(20):
            size = 0.5**halvings
            new = objective(weights + size * step)
            if new <= value + 0.01 * size * slope:
                weights, value = weights + size * step, new
                break
        else:
            break  # no descent left in the last digits
        if sweeps == 1:
            accuracy /= 4
    return weights


def _violation(weights: np.ndarray, gradient: np.ndarray) -> float:
    """How far the subgradients are from 0, summed over features."""
    inside = np.maximum(np.abs(gradient) - 1, 0)
    return float(np.where(weights == 0, inside, np.abs(gradient + np.sign(weights))).sum())


def _coordinate_descent(
    weights: np.ndarray,
    gradient: np.ndarray,
    hessian: np.ndarray,
    enough: float,
    order: list[int],
    draw: Iterator[int],
) -> tuple[np.ndarray, int]:
    """Reduce gradient.d + d.hessian.d / 2 + |weights + d|_1 until a sweep met less than ``enough`` violation.

    Args:
        order: of the coordinates, shuffled in place by ``draw`` before each sweep.

    Returns:
        the step d, and the number of sweeps.
    """
    w, g, h = weights.tolist(), gradient.tolist(), hessian.tolist()  # plain numbers: too few for arrays
    new = list(w)
    num_sweeps, violation = 0, np.inf
    while violation > enough and num_sweeps < 1000:
        num_sweeps, violation = num_sweeps + 1, 0.0
        for place in range(len(order)):
            other = place + (next(draw) * (len(order) - place) >> 32)
            order[place], order[other] = order[other], order[place]
        for j in order:
            row = h[j]
            curvature = row[j] + 1e-12
            slope = g[j] + sum(a * (b - c) for a, b, c in zip(row, new, w, strict=True))
            if new[j] == 0:
                violation += max(abs(slope) - 1, 0.0)
            else:
                violation += abs(slope + (1 if new[j] > 0 else -1))
            if slope + 1 < curvature * new[j]:
                change = -(slope + 1) / curvature
            elif slope - 1 > curvature * new[j]:
                change = -(slope - 1) / curvature
            else:
                change = -new[j]
            if abs(change) >= 1e-12:
                new[j] += min(max(change, -10.0), 10.0)
    return np.array(new) - weights, num_sweeps


def _liblinear_draws() -> Iterator[int]:
    """The 32-bit integers that scikit-learn's liblinear shuffles coordinates by, at random_state=123.

    A fit stopped early depends on the order of coordinates, so the published digits depend on these.
    """
    key = [_LIBLINEAR_SEED]
    for index in range(1, 624):  # how a Mersenne twister starts from a number
        key.append((1812433253 * (key[-1] ^ key[-1] >> 30) + index) % 2**32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": 624}}
    while True:
        yield from twister.random_raw(64).tolist()
