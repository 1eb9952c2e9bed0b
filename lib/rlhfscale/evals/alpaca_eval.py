"""AlpacaEval 2.0: preferences from a judge's log-probabilities; raw, discrete and length-controlled win rates.

The length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475) asks what the judge would prefer if both answers
were equally long. A logistic model without intercept is fitted to a model's preferences,

    q_i = sigmoid(w_length * tanh((len_baseline_i - len_model_i) / s) + w_difficulty * difficulty_i + w_bias),

and evaluated with the length term set to 0. What the original lacks: `lc_interval` refits inside each bootstrap draw,
where the published standard error takes the fit as known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import expit, logit

from rlhfscale.evals.logistic import Rows, fit, loss
from rlhfscale.stats.bootstrap import Interval, bootstrap

FIRST, SECOND = "m", "M"
"""The names under which the judge sees the first and the second answer; its one token is one of them."""
CS = np.logspace(-4, 4, 10)
"""Candidates for C, the inverse strength of the L1 penalty."""
NUM_FOLDS = 5
GAMED_WEIGHT = 0.1
"""Weight of a regularising row: 0.2 for the two gamed models together."""


# Preferences.


def swapped(seed: int, instruction_index: int) -> bool:
    """Whether the judge sees the model's answer first: a fair coin by seed and instruction, whatever else is judged."""
    return bool(np.random.default_rng((seed, instruction_index)).integers(2))


def preference(logprobs: Mapping[str, float] | None, is_swapped: bool) -> float:
    """The preference in [1, 2] of one judgment: 1 if the baseline wins for sure, 2 if the model does.

    Args:
        logprobs: log-probabilities of the judge's likeliest first tokens; an absent name counts as probability 0.
        is_swapped: whether the model's answer was shown first, see `swapped`.

    Returns:
        NaN where neither name is among the tokens (a missing value).
    """
    first, second = ((logprobs or {}).get(name, -np.inf) for name in (FIRST, SECOND))
    if not np.isfinite(max(first, second)):
        return float("nan")
    value = 2.0 - float(expit(first - second))
    return 3.0 - value if is_swapped else value


@dataclass(frozen=True)
class Annotations:
    """One model's judgments against the baseline; rows whose preference is missing are dropped by `valid`.

    Attributes:
        preference: float64 [row] in [1, 2], NaN for a missing value.
        len_baseline: float64 [row], characters of the baseline's answer.
        len_model: float64 [row], characters of the model's answer.
        difficulty: float64 [row], the instruction's difficulty; taken by position in the published list of annotations
            (see `difficulty_by_position`). Zeros leave the term out.
    """

    preference: np.ndarray
    len_baseline: np.ndarray
    len_model: np.ndarray
    difficulty: np.ndarray

    def __post_init__(self):
        names = ("preference", "len_baseline", "len_model", "difficulty")
        for name in names:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        shapes = {name: getattr(self, name).shape for name in names}
        if len(set(shapes.values())) > 1 or self.preference.ndim != 1:
            raise ValueError(f"annotations need four columns of equal length, got {shapes}")
        known = self.preference[~np.isnan(self.preference)]
        if ((known != 0) & ((known < 1) | (known > 2))).any():
            raise ValueError("preference: must be in [1, 2], or 0 for a draw (the old code), or NaN")
        for name in names[1:]:
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name}: not finite in row {int(np.argmin(np.isfinite(getattr(self, name))))}")

    def __len__(self) -> int:
        return len(self.preference)

    @property
    def valid(self) -> "Annotations":
        """The rows with a preference."""
        keep = ~np.isnan(self.preference)
        return Annotations(self.preference[keep], self.len_baseline[keep], self.len_model[keep], self.difficulty[keep])

    @property
    def wins(self) -> np.ndarray:
        """float64 [row] in [0, 1]: the model's share of each win, 0.5 for a draw."""
        return np.where(self.preference == 0, 0.5, self.preference - 1.0)


def difficulty_by_position(difficulty: Sequence[float], position: Sequence[int]) -> np.ndarray:
    """The difficulty of each row by its position in the list of annotations, float64 [row].

    The published numbers use the position and not the instruction's own index: a model with a missing row has every
    later difficulty shifted by one.
    """
    difficulty, position = np.asarray(difficulty, float), np.asarray(position)
    if len(position) and not 0 <= position.min() <= position.max() < len(difficulty):
        raise ValueError(f"position: must be from 0 to {len(difficulty) - 1}, got up to {position.max()}")
    return difficulty[position]


# Raw win rates.


def win_rates(annotations: Annotations) -> dict[str, float]:
    """Raw and discrete win rate in percent, counts and mean length.

    ``win_rate`` and ``standard_error`` are 100 times mean and standard error of the wins; ``discrete_win_rate`` takes
    each preference to the nearer of 1 and 2 first; ``n_missing`` rows have no preference and are left out of all.

    Raises:
        ValueError: fewer than two rows with a preference.
    """
    valid = annotations.valid
    wins, count = valid.wins, len(valid)
    if count < 2:
        raise ValueError(f"{count} of {len(annotations)} rows have a preference; a win rate needs at least 2")
    won, lost = int((wins > 0.5).sum()), int((wins < 0.5).sum())
    return {
        "win_rate": 100 * wins.mean(),
        "standard_error": 100 * wins.std(ddof=1) / np.sqrt(count),
        "discrete_win_rate": 100 * (won + (count - won - lost) / 2) / count,
        "n_wins": won,
        "n_wins_base": lost,
        "n_draws": count - won - lost,
        "n_total": count,
        "n_missing": len(annotations) - count,
        "avg_length": int(valid.len_model.mean()),
    }


# The length-controlled win rate.


def length_feature(len_baseline: np.ndarray, len_model: np.ndarray) -> np.ndarray:
    """tanh of the difference in characters over its own sample standard deviation (0 where nothing varies)."""
    delta = len_baseline - len_model
    spread = delta.std(ddof=1)
    return np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta, dtype=float)


def gamed_rows(preference: np.ndarray, std_delta_len: np.ndarray, difficulty: np.ndarray) -> Rows:
    """Regularising rows: two rewordings of the baseline, concise and verbose, against the baseline itself.

    Their only difference is length, so they hold the length coefficient where a model's own lengths say little.

    Args:
        preference: float64 [row] in [0, 1], share of the win of the reworded answer.
        std_delta_len: float64 [row], difference of length over its standard deviation within its model.
        difficulty: float64 [row].
    """
    features = np.column_stack([np.tanh(std_delta_len), difficulty, np.zeros(len(preference))])
    return Rows(features, np.asarray(preference, float), np.full(len(preference), GAMED_WEIGHT))


@dataclass(frozen=True)
class LengthControlled:
    """A fitted length-controlled win rate.

    Attributes:
        win_rate: percent, at equal length.
        standard_error: of the mean over instructions, in percent, with the fit taken as known (the published one).
        weights: float64 [3]: length, difficulty, bias.
        C: inverse strength of the penalty.
    """

    win_rate: float
    standard_error: float
    weights: np.ndarray
    C: float


def length_controlled(
    annotations: Annotations,
    gamed: Rows | None,
    *,
    C: float | None = None,
    folds: Sequence[int] | None = None,
    rng: np.random.Generator | None = None,
) -> LengthControlled:
    """Fit one model's length-controlled win rate.

    Args:
        annotations: the model's rows; those without a preference are left out.
        gamed: regularising rows (`gamed_rows`), which come first; None fits without them.
        C: inverse strength of the penalty; None chooses it from `CS` by cross-validation.
        folds: int [row] in 0..4, of gamed rows and the model's rows in this order; None draws them with ``rng``.
        rng: source of the folds.

    Raises:
        ValueError: fewer than two rows with a preference; folds of another length; neither C, folds nor rng.
    """
    valid = annotations.valid
    if len(valid) < 2:
        raise ValueError(f"{len(valid)} rows have a preference; a length-controlled win rate needs at least 2")
    rows = _training_rows(valid, gamed)
    if C is None:
        C = choose_C(rows, _folds(len(rows), folds, rng))
    weights = fit(rows, C)
    predicted = _at_equal_length(weights, valid.difficulty)
    error = 100 * predicted.std(ddof=1) / np.sqrt(len(valid))
    return LengthControlled(100 * predicted.mean(), error, weights, float(C))


def from_weights(w_difficulty: float, w_bias: float, difficulty: Sequence[float]) -> float:
    """The length-controlled win rate in percent of published weights."""
    return 100 * float(_at_equal_length(np.array([0.0, w_difficulty, w_bias]), np.asarray(difficulty, float)).mean())


def win_rate_interval(annotations: Annotations, *, rng: np.random.Generator, num_draws: int = 2000) -> Interval:
    """The raw win rate in percent with a 95% interval from resampling instructions."""
    return bootstrap(100 * annotations.valid.wins, np.mean, unit="prompt", rng=rng, num_draws=num_draws, on="means")


def lc_interval(
    annotations: Annotations, gamed: Rows | None, *, C: float, rng: np.random.Generator, num_draws: int = 200
) -> Interval:
    """The length-controlled win rate in percent with a 95% interval that includes the fit's own uncertainty.

    Each draw resamples the model's rows, standardises their lengths anew and refits; C and the gamed rows stay, as
    parts of the metric. The interval is made for the logit, so that it stays within 0 and 100.
    """
    valid = annotations.valid
    # from the full fit each refit takes a step or two
    start = fit(_training_rows(valid, gamed), C)
    statistic = partial(_lc_logit, gamed=gamed, C=C, start=start)
    values = (valid.preference, valid.len_baseline, valid.len_model, valid.difficulty)
    interval = bootstrap(values, statistic, unit="prompt", rng=rng, num_draws=num_draws)
    return interval.map(lambda value: 100 * expit(value))


def _lc_logit(values: tuple[np.ndarray, ...], gamed: Rows | None, C: float, start: np.ndarray) -> float:
    drawn = Annotations(*values)
    weights = fit(_training_rows(drawn, gamed), C, start=start, tolerance=1e-8)
    return float(logit(_at_equal_length(weights, drawn.difficulty).mean()))


def _training_rows(annotations: Annotations, gamed: Rows | None) -> Rows:
    length = length_feature(annotations.len_baseline, annotations.len_model)
    features = np.column_stack([length, annotations.difficulty, np.ones(len(annotations))])
    own = Rows(features, annotations.wins, np.ones(len(annotations)))
    if gamed is None:
        return own
    pairs = ((getattr(gamed, name), getattr(own, name)) for name in ("features", "target", "weight"))
    return Rows(*(np.concatenate(pair) for pair in pairs))


def _at_equal_length(weights: np.ndarray, difficulty: np.ndarray) -> np.ndarray:
    return expit(weights[1] * difficulty + weights[2])


def _folds(count: int, folds: Sequence[int] | None, rng: np.random.Generator | None) -> np.ndarray:
    if folds is not None:
        folds = np.asarray(folds)
        if folds.shape != (count,):
            raise ValueError(f"folds: need one for each of the {count} rows, gamed rows included; got {folds.shape}")
        return folds
    if rng is None:
        raise ValueError("give C, or folds or rng to choose it by cross-validation")
    return rng.permutation(np.arange(count) % NUM_FOLDS)


def choose_C(rows: Rows, folds: np.ndarray, cs: Sequence[float] = CS) -> float:
    """The C with the least held-out loss, mean over folds; the smallest among equals.

    How much it matters is known: from C = 2.8 upwards the scores differ by millionths and the win rate by less than
    0.15 points.
    """
    losses = np.zeros(len(cs))
    for fold in np.unique(folds):
        train, held_out = rows[folds != fold], rows[folds == fold]
        for place, C in enumerate(cs):
            weights = fit(train, C)
            losses[place] += (held_out.weight * loss(held_out, weights)).mean() / 2  # as if each row stood twice
    return float(cs[int(np.argmin(losses))])
