"""30_benchmarks: planted win rates are recovered, and the figure is made with and without what MT-Bench needs."""

import numpy as np
import pandas as pd
import pytest

from rlhfscale.claims import benchmarks
from rlhfscale.evals import alpaca_eval, planted, revisions, sources, stages
from rlhfscale.runs import grid
from rlhfscale.runs.store import Store
from rlhfscale.study import params
from rlhfscale.study.params import ParamsError
from rlhfscale.study.results import ResultsFolder

SMOKE = {"recipe": "smoke", "num_instructions": 40, "num_simulations": 4, "num_refits": 10}


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHFSCALE_RESULTS", str(tmp_path))
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)


def smoke(**change):
    return benchmarks.Params.parse(params.load("30_benchmarks", "smoke").resolved() | SMOKE | change)


def covered(P, folder):
    """The artifact of the coverage, made here."""
    store = Store(folder)
    with store.create(P.coverage) as artifact:
        stages.coverage(P.coverage, {}, artifact)
    return grid.Results(store, (P.coverage,), {P.coverage.key: "done"})


def test_strength_and_win_rate_are_inverses():
    for rate in (5.0, 35.0, 50.0, 90.0):
        assert planted.expected_win_rate(planted.strength(rate)) == pytest.approx(rate)
    difficulty = np.random.default_rng(0).normal(size=400_000)
    truth = 100 / (1 + np.exp(-(planted.strength(35.0) + planted.DIFFICULTY_WEIGHT * difficulty)))
    assert truth.mean() == pytest.approx(35, abs=0.1)


def test_the_planted_win_rate_is_recovered_where_the_raw_one_is_not():
    rng = np.random.default_rng(1)
    drawn = planted.annotations(rng, win_rate=35.0, extra_chars=900, num_instructions=20_000)
    regular = planted.gamed(rng, num_instructions=20_000)
    assert alpaca_eval.win_rates(drawn)["win_rate"] > 45
    assert alpaca_eval.length_controlled(drawn, regular, C=planted.C).win_rate == pytest.approx(35, abs=1)


@pytest.mark.slow
def test_coverage_of_the_refitting_interval():
    shares = planted.coverage(
        seed=3, win_rate=35.0, extra_chars=900, num_instructions=200, num_simulations=150, num_refits=50
    )
    assert 0.90 <= shares["refit"] <= 0.99 and shares["published"] < 0.75


def test_wilson_by_hand():
    assert benchmarks.proportion_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert benchmarks.proportion_interval(1.0, 10)[1] == pytest.approx(1)


def test_without_anything_installed_the_figure_is_made_and_says_what_to_install(nothing_installed, tmp_path):
    P = smoke()
    made = covered(P, tmp_path / "coverage")
    assert P.specs() == (P.coverage,) and "make setup EXTRAS=judge" in " ".join(P.missing)
    tables = benchmarks.measure(P, made)
    note = benchmarks.mt_bench_note(P, tables)
    assert "was not run here" in note and "EXTRAS=judge" in note and "EXTRAS=smollm2" in note
    assert "mt_bench.csv" not in tables.extra
    figure = benchmarks.draw(tables.summary, None)
    assert "figure.png" in tables.save(P, {"figure": figure}, made, 1.0)
    assert (tmp_path / "custom" / "30_benchmarks" / "figure.png").stat().st_size > 5000


def test_an_earlier_table_of_the_same_parameters_is_kept(nothing_installed, tmp_path):
    P, other = smoke(), smoke(seed=9)
    row = {"quantity": "mt_bench/win_rate_adjusted", "estimate": 0.5, "ci_low": 0.4, "ci_high": 0.6, "num_prompts": 8}
    rows = pd.DataFrame([row, row | {"quantity": "mt_bench/extra_chars"}]).assign(judge="hf:x", params_hash=P.hash)
    ResultsFolder("30_benchmarks", tier="custom").write_table("mt_bench.csv", rows)
    tables = benchmarks.measure(P, covered(P, tmp_path / "coverage"))
    assert "earlier run's" in benchmarks.mt_bench_note(P, tables)
    benchmarks.draw(tables.summary, tables.extra["mt_bench.csv"])
    assert "mt_bench.csv" not in benchmarks.measure(other, covered(other, tmp_path / "other")).extra


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"win_rates": [50.0]}, "extra_chars: needs one value for each of win_rates"),
        ({"win_rates": [50.0, 0.0], "extra_chars": [1, 2]}, "win_rates"),
        ({"judge": "gpt"}, "judge: 'gpt' is none of endpoint:MODEL"),
        ({"num_questions": 81}, "num_questions"),
    ],
)
def test_bad_parameters_are_named(change, words):
    with pytest.raises(ParamsError, match=words):
        smoke(**change)


def test_revisions(tmp_path):
    assert not revisions.installed(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        revisions.revision(str(tmp_path))
