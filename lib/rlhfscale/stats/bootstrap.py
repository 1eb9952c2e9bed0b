"""Bootstrap intervals that hold with five seeds.

Two things go wrong when an array [seed, prompt] is resampled naively. The percentile interval of five values is too
short (it covers about 85% where it promises 95%), and resampling rows and columns together counts the noise of the
single cell three times (Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1:386-411). Here the
resampling only estimates variance components, and a t quantile turns them into an interval:

1. each draw evaluates the statistic three times with the same resampled indices: seeds only, prompts only, both. With
   T the full-data value, the deviations ``T_seed - T``, ``T_prompt - T`` and ``T_both - T_seed - T_prompt + T`` have
   the variances V_seed (seeds + cell noise), V_prompt (prompts + cell noise) and V_cell (cell noise), each enlarged
   by n/(n-1), as a bootstrap variance is short by that factor (Hesterberg 2015, The American Statistician 69:371-386);
2. Var(T) = V_seed + max(V_prompt - V_cell, 0): for the mean this is the variance of a two-way random-effects layout;
3. the interval is T +- t * sqrt(Var(T)) with Satterthwaite's (1946) degrees of freedom, num_seeds - 1 for the first
   term and num_prompts - 1 for the second.

The statistic is refitted inside each draw, so its own estimation error is part of the interval.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit  # not scipy.stats, which takes a second to import and plans would wait for

Values = Any  # an array, or a dict or tuple of arrays, that share their last one or two axes
Statistic = Callable[[Values], Any]

NESTED_METHOD = "seed x prompt bootstrap, t"
SINGLE_METHOD = "{unit} bootstrap, t"


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    ``estimate``, ``low``, ``high``, ``std_error`` and ``seed_share`` are floats, or float64 arrays of one shape where
    the statistic returned a 1-d array; :meth:`split` gives one scalar interval per entry.
    """

    estimate: Any
    """The statistic on all data."""
    low: Any
    """Lower end of the interval."""
    high: Any
    """Upper end of the interval."""
    std_error: Any
    """Standard error of the estimate."""
    method: str
    """Kind of interval, for captions and the column ``ci_method``."""
    num_seeds: int
    """Seeds in the data; 1 where seeds are not a unit of randomness."""
    num_prompts: int
    """Prompts in the data; 1 where prompts are not a unit of randomness."""
    num_draws: int
    """Bootstrap draws."""
    confidence: float = 0.95
    """Nominal coverage."""
    seed_share: Any = 1.0
    """Share of the variance that shrinks as 1 / num_seeds; the rest needs more prompts. 1 where nothing varies."""

    def split(self) -> "list[Interval]":
        """One interval with scalar fields per entry of a 1-d statistic, in its order."""
        vectors = {f.name: getattr(self, f.name) for f in fields(self) if np.ndim(getattr(self, f.name)) == 1}
        size = np.size(self.estimate)
        return [replace(self, **{name: float(v[i]) for name, v in vectors.items()}) for i in range(size)]

    def map(self, function: Callable[[Any], Any]) -> "Interval":
        """The interval after an increasing transformation, such as ``np.exp`` of a statistic taken in log space.

        ``std_error`` and ``seed_share`` stay those of the statistic before the transformation.
        """
        ends = {name: function(getattr(self, name)) for name in ("estimate", "low", "high")}
        return replace(self, **{name: float(v) if np.ndim(v) == 0 else v for name, v in ends.items()})


def nested_bootstrap(
    values: Values,
    statistic: Statistic,
    *,
    num_draws: int = 2000,
    rng: np.random.Generator,
    confidence: float = 0.95,
    on: Literal["values", "means"] = "values",
) -> Interval:
    """Interval of a statistic of values [..., seed, prompt], where seeds and prompts are crossed.

    Seeds and prompts are shared by the leading axes (rungs, conditions) and by the arrays of a dict or tuple, so
    differences between conditions are paired. Method and sources: this module's docstring.

    Args:
        values: float64 [..., seed, prompt], or a dict or tuple of such arrays with equal last two axes.
        statistic: returns a float or a 1-d array. With ``on="values"`` it receives resampled values of the shape
            given; with ``on="means"`` it receives their means over seeds and prompts, shape [...], which is much
            faster and enough for means, differences, slopes and fits of rung means.
        num_draws: draws of seeds and prompts; the statistic is evaluated three times in each.
        rng: source of the draws.
        confidence: nominal coverage of the interval.
        on: what the statistic receives.

    Raises:
        ValueError: fewer than two seeds or prompts, axes that disagree, values or statistics that are not finite.
    """
    arrays = _checked(values, num_axes=2)
    num_seeds, num_prompts = arrays[0].shape[-2:]
    if num_seeds < 2 or num_prompts < 2:
        raise ValueError(
            f"nested_bootstrap needs at least 2 seeds and 2 prompts, got {num_seeds} and {num_prompts}; "
            "use bootstrap() for a single unit of randomness"
        )
    seeds = rng.integers(num_seeds, size=(num_draws, num_seeds))
    prompts = rng.integers(num_prompts, size=(num_draws, num_prompts))
    seed_draws, prompt_draws, both_draws = (
        _mean_draws(values, seeds, prompts) if on == "means" else _value_draws(values, seeds, prompts)
    )
    full = _map(lambda a: a.mean((-2, -1)), values) if on == "means" else values
    estimate = _evaluate(statistic, [full])[0]
    from_seeds = _evaluate(statistic, seed_draws) - estimate
    from_prompts = _evaluate(statistic, prompt_draws) - estimate
    from_both = _evaluate(statistic, both_draws) - estimate

    seed_factor, prompt_factor = num_seeds / (num_seeds - 1), num_prompts / (num_prompts - 1)
    var_seed = seed_factor * np.mean(from_seeds**2, axis=0)
    var_prompt = prompt_factor * np.mean(from_prompts**2, axis=0)
    var_cell = seed_factor * prompt_factor * np.mean((from_both - from_seeds - from_prompts) ** 2, axis=0)
    components = np.stack([var_seed, np.maximum(var_prompt - var_cell, 0.0)])
    return _interval(
        estimate,
        components,
        (num_seeds - 1, num_prompts - 1),
        confidence,
        method=NESTED_METHOD,
        num_seeds=num_seeds,
        num_prompts=num_prompts,
        num_draws=num_draws,
    )


def bootstrap(
    values: Values,
    statistic: Statistic,
    *,
    unit: Literal["seed", "prompt"],
    num_draws: int = 2000,
    rng: np.random.Generator,
    confidence: float = 0.95,
    on: Literal["values", "means"] = "values",
) -> Interval:
    """Interval of a statistic of values [..., unit] with one unit of randomness: seeds or prompts.

    The bootstrap variance enlarged by n/(n-1) and the t quantile with n-1 degrees of freedom (Hesterberg 2015); for
    the mean this is Student's interval.

    Args:
        values: float64 [..., unit], or a dict or tuple of such arrays with an equal last axis.
        statistic: as for :func:`nested_bootstrap`; with ``on="means"`` it receives the means over the last axis.
        unit: what the last axis counts.
        num_draws: bootstrap draws.
        rng: source of the draws.
        confidence: nominal coverage of the interval.
        on: what the statistic receives.

    Raises:
        ValueError: fewer than two units, axes that disagree, values or statistics that are not finite.
    """
    arrays = _checked(values, num_axes=1)
    num_units = arrays[0].shape[-1]
    if num_units < 2:
        raise ValueError(f"bootstrap needs at least 2 {unit}s, got {num_units}")
    drawn = rng.integers(num_units, size=(num_draws, num_units))
    if on == "means":
        weights = _weights(drawn, num_units)
        full = _map(lambda a: a.mean(-1), values)
        draws = _unstack(_map(lambda a: np.moveaxis(a @ weights.T, -1, 0), values), num_draws)
    else:
        full = values
        draws = (_map(lambda a, i=index: a[..., i], values) for index in drawn)
    estimate = _evaluate(statistic, [full])[0]
    variance = num_units / (num_units - 1) * np.mean((_evaluate(statistic, draws) - estimate) ** 2, axis=0)
    by_seed = unit == "seed"
    return _interval(
        estimate,
        np.stack([variance, np.zeros_like(variance)][:: 1 if by_seed else -1]),
        (num_units - 1, num_units - 1),
        confidence,
        method=SINGLE_METHOD.format(unit=unit),
        num_seeds=num_units if by_seed else 1,
        num_prompts=1 if by_seed else num_units,
        num_draws=num_draws,
    )


def _interval(estimate, components, degrees, confidence, **about) -> Interval:
    """T +- t * SE; components float64 [2, ...] are the variance from seeds and from prompts."""
    variance = components.sum(0)
    spread = variance > 0
    inverse_df = sum(c**2 / df for c, df in zip(components, degrees, strict=True))
    df = np.divide(variance**2, inverse_df, out=np.ones_like(variance), where=spread)
    std_error = np.sqrt(variance)
    half = stdtrit(df, 0.5 + confidence / 2) * std_error
    share = np.divide(components[0], variance, out=np.ones_like(variance), where=spread)
    numbers = {
        "estimate": estimate,
        "low": estimate - half,
        "high": estimate + half,
        "std_error": std_error,
        "seed_share": share,
    }
    scalars = {name: float(v) if np.ndim(v) == 0 else v for name, v in numbers.items()}
    return Interval(**scalars, confidence=confidence, **about)


def _checked(values: Values, num_axes: int) -> list[np.ndarray]:
    arrays = list(values.values()) if isinstance(values, Mapping) else list(values) if _is_tuple(values) else [values]
    arrays = [np.asarray(a) for a in arrays]
    names = list(values) if isinstance(values, Mapping) else range(len(arrays))
    for name, array in zip(names, arrays, strict=True):
        if array.ndim < num_axes or array.shape[-num_axes:] != arrays[0].shape[-num_axes:]:
            raise ValueError(f"values[{name!r}] has shape {array.shape}: its last {num_axes} axes must be shared")
        if not np.isfinite(array).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"values[{name!r}] is not finite at index {where}")
    return arrays


def _is_tuple(values: Values) -> bool:
    return isinstance(values, tuple)


def _map(function: Callable[[np.ndarray], np.ndarray], values: Values) -> Values:
    if isinstance(values, Mapping):
        return {name: function(np.asarray(a)) for name, a in values.items()}
    if _is_tuple(values):
        return tuple(function(np.asarray(a)) for a in values)
    return function(np.asarray(values))


def _weights(indices: np.ndarray, num_units: int) -> np.ndarray:
    """Drawn indices int [draw, unit] as weights float64 [draw, unit] that sum to 1 in each draw."""
    num_draws = len(indices)
    flat = (indices + num_units * np.arange(num_draws)[:, None]).ravel()
    return np.bincount(flat, minlength=num_draws * num_units).reshape(num_draws, num_units) / num_units


def _mean_draws(values: Values, seeds: np.ndarray, prompts: np.ndarray) -> list[Iterator[Values]]:
    """Means over seeds and prompts in each draw, for seeds, prompts and both resampled; weights replace copies."""
    num_draws, num_seeds = seeds.shape
    seed_weights, prompt_weights = _weights(seeds, num_seeds), _weights(prompts, prompts.shape[1])

    def both(array: np.ndarray) -> np.ndarray:
        return np.einsum("...sd,ds->d...", array @ prompt_weights.T, seed_weights)

    reduced = (
        _map(lambda a: np.moveaxis(a.mean(-1) @ seed_weights.T, -1, 0), values),
        _map(lambda a: np.moveaxis(a.mean(-2) @ prompt_weights.T, -1, 0), values),
        _map(both, values),
    )
    return [_unstack(means, num_draws) for means in reduced]


def _value_draws(values: Values, seeds: np.ndarray, prompts: np.ndarray) -> list[Iterator[Values]]:
    """Resampled copies of the values in each draw, for seeds, prompts and both resampled."""
    return [
        (_map(lambda a, s=s: a[..., s, :], values) for s in seeds),
        (_map(lambda a, p=p: a[..., p], values) for p in prompts),
        (_map(lambda a, s=s, p=p: a[..., s[:, None], p], values) for s, p in zip(seeds, prompts, strict=True)),
    ]


def _unstack(values: Values, num_draws: int) -> Iterator[Values]:
    return (_map(lambda a, d=draw: a[d], values) for draw in range(num_draws))


def _evaluate(statistic: Statistic, draws) -> np.ndarray:
    results = np.array([statistic(draw) for draw in draws], dtype=float)
    if results.ndim > 2:
        raise ValueError(f"the statistic must return a float or a 1-d array, got shape {results.shape[1:]}")
    if not np.isfinite(results).all():
        bad = int((~np.isfinite(results)).reshape(len(results), -1).any(axis=1).sum())
        raise ValueError(f"the statistic is not finite in {bad} of {len(results)} draws")
    return results


def summary_row(quantity: str, interval: Interval, **conditions: Any) -> dict[str, Any]:
    """A row of summary.csv from a scalar interval and the values of condition columns."""
    return {
        "quantity": quantity,
        **conditions,
        "estimate": interval.estimate,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "ci_method": interval.method,
        "num_seeds": interval.num_seeds,
        "num_prompts": interval.num_prompts,
    }
