"""Intervals cover what they promise, and fits recover what was planted."""

import time
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from rlhfscale.stats import fits
from rlhfscale.stats.bootstrap import bootstrap, nested_bootstrap

NUM_SEEDS, NUM_PROMPTS = 5, 200
CONTRASTS = {"mean": np.ones(1), "difference": np.array([-1.0, 1.0]), "slope": np.arange(-2.0, 3.0) / 10}
MIXES = {  # standard deviations of seeds, prompts and single cells
    "seeds": (1, 0, 0.1),
    "seeds and prompts": (0.15, 1, 1),
    "prompts": (0.01, 1, 0.5),
    "cells": (0.02, 0.1, 3),
    "equal parts": (0.07, 0.45, 1),
}


def crossed(rng, seed_sd, prompt_sd, cell_sd, shape):
    """y[..., condition, replication, seed, prompt] with mean 0: half of each effect is shared by the conditions."""
    num_conditions, replications = shape

    def effect(seeds, prompts):
        own = rng.standard_normal((num_conditions, replications, seeds, prompts))
        return own + rng.standard_normal((1, replications, seeds, prompts))

    cells = rng.standard_normal((num_conditions, replications, NUM_SEEDS, NUM_PROMPTS))
    return seed_sd * effect(NUM_SEEDS, 1) + prompt_sd * effect(1, NUM_PROMPTS) + cell_sd * cells


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("mix", MIXES)
def test_nested_interval_covers(mix, contrast):
    rng = np.random.default_rng(20)
    weights, hits = CONTRASTS[contrast], []
    for _ in range(4):
        values = crossed(rng, *MIXES[mix], (len(weights), 500))
        interval = nested_bootstrap(values, lambda m: weights @ m, num_draws=300, rng=rng, on="means")
        hits.append((interval.low <= 0) & (interval.high >= 0))
    assert 0.93 <= np.mean(hits) <= 0.97


def test_nested_interval_covers_for_accuracies():
    """Right or wrong answers whose probability depends on the prompt and on the seed's skill."""
    rng = np.random.default_rng(21)
    difficulty = rng.standard_normal((1500, 1, NUM_PROMPTS))
    skill = 0.2 * rng.standard_normal((1500, NUM_SEEDS, 1))
    truth = NormalDist().cdf(0.4 / np.sqrt(1 + 1 + 0.2**2))
    values = (0.4 + difficulty + skill + rng.standard_normal((1500, NUM_SEEDS, NUM_PROMPTS)) > 0).astype(float)
    interval = nested_bootstrap(values, lambda m: m, num_draws=300, rng=rng, on="means")
    assert 0.93 <= np.mean((interval.low <= truth) & (interval.high >= truth)) <= 0.97


def test_naive_crossed_bootstrap_would_not_pass():
    """The percentile interval of jointly resampled seeds and prompts misses where seeds dominate."""
    rng = np.random.default_rng(22)
    means = rng.standard_normal((2000, NUM_SEEDS))
    draws = means[:, rng.integers(NUM_SEEDS, size=(300, NUM_SEEDS))].mean(-1)
    low, high = np.percentile(draws, [2.5, 97.5], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.90


@pytest.mark.parametrize(("unit", "num_units"), [("seed", 5), ("prompt", 100)])
def test_single_unit_interval_covers(unit, num_units):
    rng = np.random.default_rng(23)
    values = rng.standard_normal((4000, num_units))
    interval = bootstrap(values, lambda m: m, unit=unit, num_draws=400, rng=rng, on="means")
    assert 0.93 <= np.mean((interval.low <= 0) & (interval.high >= 0)) <= 0.97
    assert (interval.num_seeds, interval.num_prompts) == ((5, 1) if unit == "seed" else (1, 100))
    assert np.all(interval.seed_share == (1.0 if unit == "seed" else 0.0))


def test_single_unit_interval_of_a_mean_is_students():
    rng = np.random.default_rng(24)
    values = rng.standard_normal(8)
    interval = bootstrap(values, np.mean, unit="seed", num_draws=20_000, rng=rng)
    expected = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    np.testing.assert_allclose((interval.low, interval.high), expected, atol=0.03)


def test_means_are_a_shortcut_for_values():
    values = np.random.default_rng(25).standard_normal((3, 5, 40))
    options = {"num_draws": 50}
    slow = nested_bootstrap(values, lambda v: v.mean((-2, -1)), rng=np.random.default_rng(1), **options)
    fast = nested_bootstrap(values, lambda m: m, rng=np.random.default_rng(1), on="means", **options)
    np.testing.assert_allclose([slow.low, slow.high], [fast.low, fast.high], rtol=1e-10)
    one = nested_bootstrap(values[1], np.mean, rng=np.random.default_rng(1), **options)
    assert fast.split()[1].low == pytest.approx(one.low)


def test_dicts_are_resampled_together():
    rng = np.random.default_rng(26)
    before = rng.standard_normal((5, 300))
    interval = nested_bootstrap(
        {"sft": before, "ppo": before + 0.2}, lambda v: (v["ppo"] - v["sft"]).mean(), num_draws=50, rng=rng
    )
    assert interval.low == pytest.approx(0.2)
    assert interval.high == pytest.approx(0.2)


def test_speed_of_a_slope_over_five_rungs():
    values = np.random.default_rng(27).standard_normal((5, 5, 512))
    start = time.perf_counter()
    nested_bootstrap(values, lambda v: CONTRASTS["slope"] @ v.mean((-2, -1)), rng=np.random.default_rng(0))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 10)), "2 seeds"),
        (np.array([[0.0, 1.0], [np.nan, 1.0]]), r"index \(1, 0\)"),
        ({"a": np.zeros((5, 3)), "b": np.zeros((4, 3))}, "'b'"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        nested_bootstrap(values, np.mean, rng=np.random.default_rng(0))


def test_a_statistic_that_is_not_finite_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        nested_bootstrap(np.ones((5, 5)), lambda v: np.nan, num_draws=5, rng=np.random.default_rng(0))


COMPUTE = np.geomspace(1e10, 3e13, 6)
PLANTED = {
    fits.fit_power_law: {"a": 25.0, "b": 0.13},
    fits.fit_saturation_exp: {"y_inf": 0.9, "y0": 0.2, "x0": 4e12},
}


@pytest.mark.parametrize("fit", PLANTED, ids=lambda f: f.__name__)
def test_fits_recover_planted_parameters(fit):
    planted = PLANTED[fit]
    curve = fit(COMPUTE, np.linspace(1, 0.5, 6)).curve
    found = fit(COMPUTE, curve(COMPUTE, *planted.values()))
    assert list(found.parameters) == list(planted)
    assert found.parameters == pytest.approx(planted, rel=1e-3)
    assert found.r2 > 0.99999
    np.testing.assert_allclose(found.predict(COMPUTE), curve(COMPUTE, *planted.values()), rtol=1e-4)


def test_slope_per_doubling():
    fit = fits.fit_slope([1, 2, 4, 8], [0.1, 0.4, 0.7, 1.0])
    assert fit.parameters == pytest.approx({"slope": 0.3, "intercept": 0.1})
    assert fit.predict(16) == pytest.approx(1.3)


@pytest.mark.parametrize("name", ["fit_power_law", "fit_saturation_exp"])
def test_three_points_make_no_law(name):
    with pytest.raises(ValueError, match="at least 4"):
        getattr(fits, name)([1, 2, 3], [3, 2, 1])
    assert fits.fit_slope([1, 2, 4], [3, 2, 1]).parameters["slope"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([0, 1, 2, 3], [4, 3, 2, 1], "x must be positive, got 0 at index 0"),
        ([1, 2, -3, 4], [4, 3, 2, 1], "x must be positive, got -3 at index 2"),
        ([1, 2, 3, 4], [4, 3, 0, 1], "y must be positive, got 0 at index 2"),
        ([1, 2, 3, np.nan], [4, 3, 2, 1], "x must be finite, got nan at index 3"),
        ([1, 2, 3, 4], [np.inf, 3, 2, 1], "y must be finite, got inf at index 0"),
    ],
)
def test_points_that_a_power_law_cannot_have_are_named(x, y, message, capfd):
    with pytest.raises(ValueError, match=message):
        fits.fit_power_law(x, y)
    assert capfd.readouterr().err == ""


def test_an_outlier_hardly_moves_a_power_law():
    x = np.geomspace(1, 1000, 9)
    y = 2 * x**-0.5
    y[4] *= 1.5
    assert fits.fit_power_law(x, y).parameters["b"] == pytest.approx(0.5, abs=0.01)


def noisy_losses(rng, fit):
    truth = fit(COMPUTE, np.linspace(1, 0.5, 6)).curve(COMPUTE, *PLANTED[fit].values())
    noise = 0.01 * rng.standard_normal((6, 5, 1)) + 0.05 * rng.standard_normal((1, 1, 60))
    return truth[:, None, None] * np.exp(noise + 0.05 * rng.standard_normal((6, 5, 60)))


def test_the_exponents_interval_covers():
    rng = np.random.default_rng(30)
    hits = []
    for _ in range(40):
        found = fits.fit_with_intervals(
            fits.fit_power_law, COMPUTE, noisy_losses(rng, fits.fit_power_law), rng=rng, num_draws=40, grid=COMPUTE
        )
        hits.append(found.intervals["b"].low <= 0.13 <= found.intervals["b"].high)
    assert np.mean(hits) >= 0.85


def test_intervals_and_band_of_a_plateau_hold_the_truth():
    rng = np.random.default_rng(31)
    planted = PLANTED[fits.fit_saturation_exp]
    found = fits.fit_with_intervals(
        fits.fit_saturation_exp, COMPUTE, noisy_losses(rng, fits.fit_saturation_exp), rng=rng, num_draws=100
    )
    for name, interval in found.intervals.items():
        assert interval.low < planted[name] < interval.high
    truth = found.curve(found.band["x"], *planted.values())
    assert np.mean((found.band["low"] < truth) & (truth < found.band["high"])) > 0.9
    np.testing.assert_allclose(found.band["estimate"], found.predict(found.band["x"]))


def test_intervals_over_seeds_alone():
    rng = np.random.default_rng(32)
    x = np.array([0, 1, 2, 4, 8, 16.0])
    values = (0.8 - 0.3 * np.exp(-x / 3))[:, None] + 0.01 * rng.standard_normal((6, 5))
    found = fits.fit_with_intervals(fits.fit_saturation_exp, x, values, rng=rng, num_draws=100)
    assert found.intervals["y_inf"].low < 0.8 < found.intervals["y_inf"].high
    assert found.intervals["y_inf"].num_prompts == 1
