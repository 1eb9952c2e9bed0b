"""AlpacaEval: preferences by hand, the fit against a general optimiser, planted win rates and their intervals."""

import time

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from rlhfscale.evals import alpaca_eval, logistic
from rlhfscale.evals.alpaca_eval import Annotations
from rlhfscale.evals.logistic import Rows

RNG = np.random.default_rng


def planted(rng, weights=(-1.2, 0.8, -0.4), num_rows=400):
    """Annotations whose preferences follow the model, and the true win rate at equal length."""
    difficulty = rng.normal(size=num_rows)
    delta = rng.normal(300, 800, size=num_rows).round()
    length = alpaca_eval.length_feature(delta, np.zeros(num_rows))
    q = expit(weights[0] * length + weights[1] * difficulty + weights[2])
    wins = (rng.random(num_rows) < q).astype(float)
    return Annotations(1 + wins, 2000 + delta, np.full(num_rows, 2000.0), difficulty)


def gamed(rng, slope=-1.2, num_rows=400):
    length = np.tanh(rng.normal(size=num_rows))
    target = expit(slope * length)
    return alpaca_eval.gamed_rows(target, np.arctanh(length), np.zeros(num_rows))


def test_preferences_by_hand():
    even = {"m": np.log(0.2), "M": np.log(0.6), "other": np.log(0.2)}
    # the second answer has 0.75 of the two names' probability
    assert alpaca_eval.preference(even, is_swapped=False) == pytest.approx(1.75)
    assert alpaca_eval.preference(even, is_swapped=True) == pytest.approx(1.25)
    assert alpaca_eval.preference({"m": -0.1}, is_swapped=False) == 1.0
    assert alpaca_eval.preference({"M": -0.1}, is_swapped=False) == 2.0
    assert alpaca_eval.preference({"m": -0.1}, is_swapped=True) == 2.0
    for missing in (None, {}, {"The": -0.1}, {"m": -np.inf}):
        assert np.isnan(alpaca_eval.preference(missing, is_swapped=False))


def test_the_order_is_a_fair_coin_that_depends_on_seed_and_instruction_alone():
    flips = np.array([[alpaca_eval.swapped(seed, index) for index in range(800)] for seed in (1, 2)])
    assert (np.abs(flips.mean(1) - 0.5) < 0.06).all() and (flips[0] != flips[1]).mean() > 0.4
    assert flips[0, 5] == alpaca_eval.swapped(1, 5)


def test_raw_win_rates_by_hand():
    rates = alpaca_eval.win_rates(Annotations([1.2, 1.9, 0, np.nan, 1.5, 2.0], [9] * 6, [1, 2, 3, 900, 4, 5], [0] * 6))
    assert rates["win_rate"] == pytest.approx(100 * (0.2 + 0.9 + 0.5 + 0.5 + 1) / 5)
    assert rates["standard_error"] == pytest.approx(100 * np.std([0.2, 0.9, 0.5, 0.5, 1], ddof=1) / np.sqrt(5))
    assert rates["discrete_win_rate"] == pytest.approx(60)
    assert [rates[f"n_{name}"] for name in ("wins", "wins_base", "draws", "total", "missing")] == [2, 1, 2, 5, 1]
    assert rates["avg_length"] == 3


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (([1.0], [1], [1], [0, 0]), "equal length"),
        (([3.0], [1], [1], [0]), "preference"),
        (([1.5, 1.5], [1, np.nan], [1, 1], [0, 0]), "len_baseline: not finite in row 1"),
    ],
)
def test_bad_columns_are_named(columns, words):
    with pytest.raises(ValueError, match=words):
        Annotations(*columns)
    with pytest.raises(ValueError, match="1 of 2 rows"):
        alpaca_eval.win_rates(Annotations([1.0, np.nan], [1, 1], [1, 1], [0, 0]))
    with pytest.raises(ValueError, match="position"):
        alpaca_eval.difficulty_by_position([0.0, 1.0], [0, 2])


@pytest.mark.parametrize("C", [1e-4, 0.02, 2.8, 1e4])
def test_the_fit_is_the_optimum(C):
    rng = RNG(0)
    features = np.column_stack([rng.normal(size=(60, 2)), np.ones(60)])
    rows = Rows(features, rng.random(60), rng.uniform(0.1, 1, 60))

    def objective(w):
        z = features @ w
        return np.abs(w).sum() + C * (rows.weight * (np.logaddexp(0, z) - rows.target * z)).sum()

    weights = logistic.fit(rows, C, tolerance=1e-10)
    tries = [minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000})
             for start in (weights, np.zeros(3), rng.normal(size=3))]  # fmt: skip
    assert objective(weights) <= min(found.fun for found in tries) + 1e-9
    if C == 1e-4:
        assert (weights == 0).all()


def test_the_fit_stops_where_liblinear_stops():
    """Digits of scikit-learn 1.9.1's liblinear (tol=1e-4, random_state=123, C=2.78) on the doubled rows."""
    rng = RNG(5)
    features = np.column_stack([np.tanh(rng.normal(size=40)), rng.normal(size=40), np.ones(40)])
    rows = Rows(features, rng.random(40), np.ones(40))
    assert logistic.fit(rows, 2.782559402207126) == pytest.approx(LIBLINEAR, abs=1e-12)


LIBLINEAR = [-0.23399845715903075, 0.037636704615985214, -0.026998855951022485]


def test_doubling_rows_equals_a_soft_target():
    rng = RNG(1)
    rows = alpaca_eval._training_rows(planted(rng, num_rows=50), None)
    soft = Rows(rows.features, rng.random(50), rows.weight)
    doubled = Rows(
        np.concatenate([soft.features] * 2),
        np.repeat([1.0, 0.0], 50),
        np.concatenate([soft.target, 1 - soft.target]),
    )
    assert logistic.fit(soft, 2.0, tolerance=1e-10) == pytest.approx(logistic.fit(doubled, 2.0, tolerance=1e-10))


def test_the_planted_win_rate_is_recovered_and_the_length_bias_is_taken_out():
    rng = RNG(3)
    # long answers win: the model's answers are longer by 1,500 characters on average
    num_rows = 20_000
    delta = rng.normal(-1500, 1500, num_rows)
    length = alpaca_eval.length_feature(delta, np.zeros(num_rows))
    wins = (rng.random(num_rows) < expit(-2.0 * length)).astype(float)
    annotations = Annotations(1 + wins, delta, np.zeros(num_rows), np.zeros(num_rows))
    fitted = alpaca_eval.length_controlled(annotations, gamed(rng, -2.0), C=1e4)
    assert alpaca_eval.win_rates(annotations)["win_rate"] > 70
    assert fitted.win_rate == pytest.approx(50, abs=1.5)
    assert fitted.weights[0] == pytest.approx(-2.0, abs=0.1)


def test_the_baseline_against_itself_is_at_fifty():
    rows = Annotations(np.full(50, 1.5), np.arange(50), np.arange(50), RNG(0).normal(size=50))
    fitted = alpaca_eval.length_controlled(rows, None, C=1.0)
    assert fitted.win_rate == 50 and (fitted.weights == 0).all()
    assert alpaca_eval.from_weights(0.0, 0.0, rows.difficulty) == 50


@pytest.mark.slow
def test_intervals_cover_the_planted_win_rate():
    """120 data sets of 150 rows; binomial limits of 95% coverage are 0.90 and 0.98."""
    truth_rng, weights = RNG(11), (-1.2, 0.8, -0.4)
    truth = 100 * expit(weights[1] * truth_rng.normal(size=200_000) + weights[2]).mean()
    covered, ignored = 0, 0
    for draw in range(120):
        rng = RNG((12, draw))
        data = planted(rng, weights, num_rows=150)
        interval = alpaca_eval.lc_interval(data, gamed(rng), C=100.0, rng=rng, num_draws=60)
        covered += interval.low <= truth <= interval.high
        fitted = alpaca_eval.length_controlled(data, gamed(rng), C=100.0)
        ignored += abs(fitted.win_rate - truth) < 1.96 * fitted.standard_error
    assert 0.90 * 120 <= covered <= 0.99 * 120
    assert ignored < 0.8 * 120  # the published standard error leaves out the fit's uncertainty


def test_C_is_chosen_by_held_out_loss():
    rng = RNG(4)
    rows = alpaca_eval._training_rows(planted(rng, num_rows=300), gamed(rng))
    folds = rng.permutation(np.arange(len(rows)) % 5)
    chosen = alpaca_eval.choose_C(rows, folds)
    losses = []
    for C in alpaca_eval.CS:
        held_out = [
            np.mean(rows.weight[folds == k] * logistic.loss(rows[folds == k], logistic.fit(rows[folds != k], C)))
            for k in range(5)
        ]
        losses.append(np.mean(held_out))
    assert chosen == alpaca_eval.CS[np.argmin(losses)]
    with pytest.raises(ValueError, match="folds"):
        alpaca_eval.length_controlled(planted(rng), None, folds=[0, 1])
    with pytest.raises(ValueError, match="rng"):
        alpaca_eval.length_controlled(planted(rng), None)


def test_speed():
    rng = RNG(6)
    data, regular = planted(rng, num_rows=805), gamed(rng, num_rows=1610)
    start = time.perf_counter()
    alpaca_eval.length_controlled(data, regular, rng=rng)
    fit_s = time.perf_counter() - start
    alpaca_eval.lc_interval(data, regular, C=2.8, rng=rng)
    assert fit_s < 2 and time.perf_counter() - start - fit_s < 60
