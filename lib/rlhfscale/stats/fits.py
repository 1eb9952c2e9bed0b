"""Scaling laws: a power law, an exponential approach to a plateau, and the slope per doubling.

The power law of a positive loss is fitted to log values under the Huber loss (Hoffmann et al. 2022, arXiv 2203.15556,
approach 3); plateaus and slopes by least squares in the values themselves. Non-linear fits start from many points, keep
the best end point and report how far the others ended from it. Each ``fit_*`` takes ``x``, ``y`` float64 [point] and
returns a :class:`Fit`; :func:`fit_with_intervals` repeats one inside each bootstrap draw.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import optimize

from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap

HUBER_DELTA = 0.01
"""Residual of log y beyond which the Huber loss is linear: 1% of y."""
MIN_POINTS = 4
"""A law needs at least this many distinct x; with fewer only the slope is estimated."""


@dataclass(frozen=True)
class Fit:
    """A fitted curve."""

    law: str
    """Formula, with the names used in ``parameters``."""
    parameters: dict[str, float]
    """Fitted values by name."""
    curve: Callable[..., np.ndarray] = field(repr=False)
    """``curve(x, *parameters)``, in the order of ``parameters``."""
    r2: float
    """Share of the variance of y that the curve explains, on the points fitted."""
    r2_log: float = float("nan")
    """The same for log y; NaN where no logs are taken."""
    num_starts: int = 1
    """Starting points of the optimiser."""
    start_spread: float = 0.0
    """Share of the starting points that ended more than 1% above the best objective."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Bootstrap interval of each parameter; filled by :func:`fit_with_intervals`."""
    band: dict[str, np.ndarray] = field(default_factory=dict)
    """Curve and pointwise interval on a grid: ``x``, ``estimate``, ``low``, ``high``, float64 [grid]."""

    def predict(self, x) -> np.ndarray:
        """Values of the curve at ``x``, float64, same shape."""
        return self.curve(np.asarray(x, dtype=float), *self.parameters.values())


def _line(x, slope, intercept):
    return intercept + slope * np.log2(x)


def _power(x, a, b):
    return a * x**-b


def _saturation_exp(x, y_inf, y0, x0):
    return y_inf - (y_inf - y0) * np.exp(-x / x0)


def slope_per_doubling(x, y) -> float | np.ndarray:
    """Least-squares slope of y on log2 x: the change of y for each doubling of x.

    Args:
        x: float64 [point], positive, at least two distinct values.
        y: float64 [point], or [point, ...] for several curves at once.

    Raises:
        ValueError: ``x`` not positive or with fewer than two distinct values.
    """
    log_x = np.log2(_positive("x", x))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a slope needs at least 2 distinct x")
    centred = log_x - log_x.mean()
    return centred @ np.asarray(y, dtype=float) / (centred @ centred)


def fit_slope(x, y) -> Fit:
    """``y = intercept + slope * log2(x)`` by least squares; two points are enough.

    Errors: as :func:`slope_per_doubling`.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    slope = float(slope_per_doubling(x, y))
    parameters = {"slope": slope, "intercept": float(y.mean() - slope * np.log2(x).mean())}
    return Fit("y = intercept + slope * log2(x)", parameters, _line, r2=_r2(y, _line(x, *parameters.values())))


def fit_power_law(x, y, start: Fit | None = None) -> Fit:
    """``y = a * x^-b``, Huber loss on log y.

    Args:
        x, y: float64 [point], positive.
        start: an earlier fit to start from, in place of many starts.

    Raises:
        ValueError: fewer than four distinct x, or values that are not positive.
    """
    x, y = _law_points(x, y)
    x, y = _positive("x", x), _positive("y", y)
    scale = np.exp(np.log(x).mean())
    log_x, log_y = np.log(x / scale), np.log(y)

    def residual(theta):
        return theta[0] - theta[1] * log_x - log_y

    b, log_a = np.polyfit(log_x, log_y, 1)
    if start is None:
        starts = [(log_a, -b + shift) for shift in (-0.5, 0.0, 0.5)]
    else:
        starts = [(np.log(start.parameters["a"]) - start.parameters["b"] * np.log(scale), start.parameters["b"])]
    theta, spread = _best_of(residual, starts, ([-np.inf, -np.inf], [np.inf, np.inf]), huber=True)
    parameters = {"a": float(np.exp(theta[0] + theta[1] * np.log(scale))), "b": float(theta[1])}
    predicted = _power(x, *parameters.values())
    return Fit(
        "y = a * x^-b", parameters, _power, _r2(y, predicted), _r2(log_y, np.log(predicted)), len(starts), spread
    )


def fit_saturation_exp(x, y, start: Fit | None = None) -> Fit:
    """``y = y_inf - (y_inf - y0) * exp(-x / x0)`` by least squares, ``x0 > 0``; ``y0`` is the value at x = 0.

    Args:
        x, y: float64 [point]; x may be 0.
        start: an earlier fit to start from, in place of many starts.

    Raises:
        ValueError: fewer than four distinct x.
    """
    x, y = _law_points(x, y)
    span = np.ptp(x)

    def residual(theta):
        return _saturation_exp(x, theta[0], theta[1], np.exp(theta[2])) - y

    if start is None:
        starts = []
        for x0 in span * np.geomspace(0.03, 10, 8):
            (y_inf, drop), *_ = np.linalg.lstsq(np.stack([np.ones_like(x), -np.exp(-x / x0)], 1), y)
            starts.append((y_inf, y_inf - drop, np.log(x0)))
    else:
        y_inf, y0, x0 = start.parameters.values()
        starts = [(y_inf, y0, np.log(x0))]
    bounds = ([-np.inf, -np.inf, np.log(span * 1e-3)], [np.inf, np.inf, np.log(span * 1e3)])
    theta, spread = _best_of(residual, starts, bounds)
    parameters = {"y_inf": float(theta[0]), "y0": float(theta[1]), "x0": float(np.exp(theta[2]))}
    predicted = _saturation_exp(x, *parameters.values())
    return Fit(
        "y = y_inf - (y_inf - y0) * exp(-x / x0)",
        parameters,
        _saturation_exp,
        r2=_r2(y, predicted),
        num_starts=len(starts),
        start_spread=spread,
    )


_POSITIVE_CURVES = {_power}  # their bands are taken in log space
_POSITIVE_PARAMETERS = {_power: {"a"}, _saturation_exp: {"x0"}}  # so are these intervals


def fit_with_intervals(
    fit: Callable[..., Fit],
    x,
    values,
    *,
    rng: np.random.Generator,
    num_draws: int = 500,
    confidence: float = 0.95,
    grid=None,
    unit: Literal["seed", "prompt"] = "seed",
) -> Fit:
    """Fit the means over seeds (and prompts), then refit inside each bootstrap draw for intervals and a band.

    Intervals of scale parameters and bands of positive laws are taken in log space.

    Args:
        fit: one of the ``fit_*`` functions of this module.
        x: float64 [point].
        values: float64 [point, seed, prompt] (nested bootstrap) or [point, unit] (bootstrap of that unit).
        rng: source of the draws.
        num_draws: bootstrap draws.
        confidence: nominal coverage.
        grid: float64 [grid], where the band is evaluated; by default 50 points from min to max of x, log-spaced where
            x is positive.
        unit: what the last axis of values [point, unit] counts.

    Returns:
        The fit of the means with ``intervals`` and ``band`` filled.

    Raises:
        ValueError: as ``fit`` and the bootstrap.
    """
    x, values = np.asarray(x, dtype=float), np.asarray(values, dtype=float)
    if values.ndim not in (2, 3) or len(values) != len(x):
        raise ValueError(f"values must be [point, seed] or [point, seed, prompt] with {len(x)} points: {values.shape}")
    best = fit(x, values.mean(axis=tuple(range(1, values.ndim))))
    if grid is None:
        grid = np.geomspace(x.min(), x.max(), 50) if x.min() > 0 else np.linspace(x.min(), x.max(), 50)
    grid = np.asarray(grid, dtype=float)
    log_curve, log_names = best.curve in _POSITIVE_CURVES, _POSITIVE_PARAMETERS.get(best.curve, set())
    warm: dict[str, Any] = {} if fit is fit_slope else {"start": best}

    def statistic(means: np.ndarray) -> np.ndarray:
        drawn = fit(x, means, **warm)
        parameters = [np.log(v) if name in log_names else v for name, v in drawn.parameters.items()]
        curve = drawn.predict(grid)
        return np.concatenate([parameters, np.log(curve) if log_curve else curve])

    options = {"num_draws": num_draws, "rng": rng, "confidence": confidence, "on": "means"}
    if values.ndim == 3:
        parts = nested_bootstrap(values, statistic, **options).split()
    else:
        parts = bootstrap(values, statistic, unit=unit, **options).split()
    intervals = {
        name: interval.map(np.exp) if name in log_names else interval
        for name, interval in zip(best.parameters, parts, strict=False)
    }
    curve = [p.map(np.exp) if log_curve else p for p in parts[len(intervals) :]]
    band = {"x": grid} | {name: np.array([getattr(p, name) for p in curve]) for name in ("estimate", "low", "high")}
    return replace(best, intervals=intervals, band=band)


def _best_of(residual, starts, bounds, huber: bool = False) -> tuple[np.ndarray, float]:
    low, high = (np.asarray(b) for b in bounds)
    options = {"loss": "huber", "f_scale": HUBER_DELTA} if huber else {}
    ends = [
        optimize.least_squares(
            residual,
            np.clip(start, np.nextafter(low, np.inf), np.nextafter(high, -np.inf)),
            bounds=(low, high),
            x_scale="jac",
            max_nfev=400,
            **options,
        )
        for start in starts
    ]
    costs = np.array([end.cost for end in ends])
    best = ends[int(np.argmin(costs))]
    return best.x, float(np.mean(costs > 1.01 * costs.min() + 1e-12))


def _law_points(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"x and y must be 1-d of one length, got {x.shape} and {y.shape}")
    for name, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name} must be finite, got {values[index]} at index {index}")
    if len(np.unique(x)) < MIN_POINTS:
        raise ValueError(f"a law needs at least {MIN_POINTS} distinct x, got {len(np.unique(x))}; use fit_slope")
    return x, y


def _positive(name: str, values) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if not (values > 0).all():
        raise ValueError(f"{name} must be positive, got {values.min():.6g} at index {int(values.argmin())}")
    return values


def _r2(y: np.ndarray, predicted: np.ndarray) -> float:
    total = np.sum((y - y.mean()) ** 2)
    return float(1 - np.sum((y - predicted) ** 2) / total) if total > 0 else float("nan")
