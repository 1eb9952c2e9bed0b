"""Rules give each verdict on planted data, and the ledger holds what was judged."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhfscale.claims import c05_responses_per_prompt as c05
from rlhfscale.claims import c09_algorithms as c09
from rlhfscale.stats.bootstrap import Interval, nested_bootstrap
from rlhfscale.stats.fits import slope_per_doubling
from rlhfscale.study.ledger import write_ledger
from rlhfscale.study.results import ResultsFolder
from rlhfscale.study.rules import CLAIMS, ClaimResult, Part, Rule, register, seeds_to_settle


def interval(low, high, **changes):
    estimate = (low + high) / 2
    about = {"method": "m", "num_seeds": 5, "num_prompts": 100, "num_draws": 10} | changes
    return Interval(estimate, low, high, (high - low) / 5.55, **about)


@pytest.mark.parametrize(("slope", "verdict"), [(-0.03, "reproduced"), (0.03, "contradicted"), (0, "inconclusive")])
def test_c1_on_planted_gains(slope, verdict):
    rng = np.random.default_rng(3)
    sizes = np.geomspace(25e3, 1e6, 5)
    mean = 0.1 + slope * np.log2(sizes / 25e3)
    gains = mean[:, None, None] + 0.01 * rng.standard_normal((5, 5, 1)) + 0.2 * rng.standard_normal((5, 5, 100))
    found = nested_bootstrap(gains, lambda m: slope_per_doubling(sizes, m), num_draws=200, rng=rng, on="means")
    assert CLAIMS["C1"].judge(found).verdict == verdict


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((0.01, 0.05), "reproduced"), ((-0.05, -0.01), "contradicted"), ((-0.01, 0.05), "inconclusive"),
     ((0.0, 0.05), "inconclusive")],
)  # fmt: skip
def test_c6_is_on_the_other_side_of_zero_than_c1(ends, verdict):
    mirrored = {"reproduced": "contradicted", "contradicted": "reproduced"}.get(verdict, verdict)
    assert CLAIMS["C6"].judge(interval(*ends)).verdict == verdict
    assert CLAIMS["C1"].judge(interval(*ends)).verdict == mirrored


YES, NO, OPEN = interval(1, 2), interval(-2, -1), interval(-1, 1)


@pytest.mark.parametrize(
    ("first", "second", "if_all", "if_any"),
    [
        (YES, YES, "reproduced", "reproduced"),
        (YES, OPEN, "inconclusive", "reproduced"),
        (YES, NO, "contradicted", "reproduced"),
        (OPEN, NO, "contradicted", "inconclusive"),
        (NO, NO, "contradicted", "contradicted"),
        (OPEN, OPEN, "inconclusive", "inconclusive"),
    ],
)
def test_rules_of_two_parts(first, second, if_all, if_any):
    parts = (Part("first", "above"), Part("second", "above"))
    intervals = {"first": first, "second": second}
    assert Rule(parts, "all").verdict(intervals) == if_all
    assert Rule(parts, "any").verdict(intervals) == if_any
    with pytest.raises(ValueError, match="second"):
        Rule(parts).verdict({"first": first})


@pytest.mark.parametrize(
    ("ppo", "best_of_n", "verdict"),
    [(0.005, 0.02, "reproduced"), (0.02, 0.005, "contradicted"), (-0.01, 0.02, "contradicted"),
     (0.01, 0.01, "inconclusive"), (0.0, 0.02, "inconclusive")],
)  # fmt: skip
def test_c2_on_planted_gains(ppo, best_of_n, verdict):
    rng = np.random.default_rng(5)
    sizes = np.geomspace(14e3, 330e3, 5)
    means = np.array([[ppo], [best_of_n]]) * np.log2(sizes / 14e3)
    gains = means[..., None, None] + 0.004 * rng.standard_normal((2, 5, 5, 1)) + 0.2 * rng.standard_normal((5, 400))

    def slopes(means):
        of_ppo, of_best = slope_per_doubling(sizes, means.T)
        return np.array([of_ppo, of_best - of_ppo])

    found = nested_bootstrap(gains, slopes, num_draws=300, rng=rng, on="means").split()
    assert CLAIMS["C2"].judge(dict(zip(CLAIMS["C2"].rule.intervals, found, strict=True))).verdict == verdict


@pytest.mark.parametrize(
    ("doublings", "verdict"),
    [((0.03, 0.02, 0.01, 0.0, 0.0), "reproduced"), ((0.02, 0.02, 0.02, 0.02, 0.02), "contradicted"),
     ((-0.02, -0.02, 0.0, 0.0, 0.0), "contradicted"), ((0.0, 0.0, 0.0, 0.0, 0.0), "inconclusive"),
     ((0.02, 0.02, 0.02, 0.02, 0.01), "inconclusive")],
)  # fmt: skip
def test_c5_on_planted_ladders(doublings, verdict):
    rng = np.random.default_rng(6)
    means = 0.5 + np.cumsum([0, *doublings])
    values = means[:, None, None] + 0.003 * rng.standard_normal((6, 5, 1)) + 0.2 * rng.standard_normal((5, 400))
    found = nested_bootstrap(values, c05.first_and_last_doubling, num_draws=300, rng=rng, on="means").split()
    assert CLAIMS["C5"].judge(dict(zip(CLAIMS["C5"].rule.intervals, found, strict=True))).verdict == verdict


GAIN = interval(0.04, 0.05)


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [((-0.006, 0.008), "reproduced"), ((0.002, 0.008), "reproduced"), ((0.011, 0.02), "contradicted"),
     ((-0.03, -0.012), "contradicted"), ((-0.004, 0.014), "inconclusive"), ((-0.03, 0.03), "inconclusive"),
     ((-0.01, 0.0), "inconclusive")],
)  # fmt: skip
def test_c9_is_a_test_for_equivalence(ends, verdict):
    """A difference shown to be small counts as none, even one shown not to be 0; failing to show one does not."""
    assert CLAIMS["C9"].judge({"GRPO minus PPO": interval(*ends), "PPO gain": GAIN}).verdict == verdict


@pytest.mark.parametrize("gain", [(0.0, 0.0), (0.005, 0.015), (-0.04, -0.02)])
def test_c9_says_nothing_of_policies_that_learned_nothing(gain):
    for difference in (interval(-0.001, 0.001), interval(0.02, 0.03)):
        assert CLAIMS["C9"].judge({"GRPO minus PPO": difference, "PPO gain": interval(*gain)}).verdict == "inconclusive"


@pytest.mark.parametrize("shift", [0.0, 0.009, 0.03])
def test_c9_keeps_its_error_rate(shift):
    """Just inside the margin it decides nothing, well inside it finds equivalence, well beyond it a difference."""
    rng = np.random.default_rng(7)
    verdicts = []
    for _ in range(200):
        values = shift + 0.003 * rng.standard_normal((5, 1)) + 0.02 * rng.standard_normal((5, 60))
        found = nested_bootstrap(values, np.mean, num_draws=100, rng=rng, on="means")
        verdicts.append(CLAIMS["C9"].judge({"GRPO minus PPO": found, "PPO gain": GAIN}).verdict)
    share = {verdict: verdicts.count(verdict) / len(verdicts) for verdict in set(verdicts)}
    if shift == 0:
        assert share["reproduced"] >= 0.9
    elif shift < c09.EQUIVALENCE_MARGIN:
        assert share.get("reproduced", 0) < 0.3 and share.get("contradicted", 0) <= 0.025
    else:
        assert share["contradicted"] >= 0.9


def test_an_equivalence_has_one_row_for_each_interval(tmp_path):
    result = CLAIMS["C9"].judge({"GRPO minus PPO": interval(-0.004, 0.014), "PPO gain": GAIN})
    ResultsFolder("09_algorithms", "smoke", tmp_path).write_claims([result])
    write_ledger(tmp_path / "smoke")
    write_ledger(tmp_path / "smoke")
    table = pd.read_csv(tmp_path / "smoke" / "claims.csv")
    assert table["estimate"].tolist() == [0.005, 0.045] and table["seeds_to_settle"][0].startswith("about ")
    assert pd.isna(table["seeds_to_settle"][1])
    failed = CLAIMS["C9"].judge({"GRPO minus PPO": interval(-0.004, 0.004), "PPO gain": interval(-0.04, -0.02)})
    ResultsFolder("09_algorithms", "smoke", tmp_path).write_claims([failed])
    write_ledger(tmp_path / "smoke")
    assert pd.read_csv(tmp_path / "smoke" / "claims.csv")["seeds_to_settle"].isna().all()  # no seeds would help
    assert "GRPO minus PPO < 0.01 and GRPO minus PPO > -0.01" in table["rule"][0]


def test_a_claim_is_registered_once():
    with pytest.raises(ValueError, match="claim C1 is registered twice"):
        register(CLAIMS["C1"])


def test_every_registered_claim_has_a_rule_with_an_interval():
    for claim_id, claim in CLAIMS.items():
        assert claim.id == claim_id
        assert claim.statement
        assert claim.statistic
        assert claim.rule.parts


def test_seeds_to_settle():
    far, near = interval(-0.5, 3.5), interval(-1.5, 2.5)
    assert seeds_to_settle(far) < seeds_to_settle(near)
    needed = seeds_to_settle(near)
    rng = np.random.default_rng(4)
    scale = near.std_error * np.sqrt(5)
    samples = near.estimate + scale * rng.standard_normal((4000, needed))
    low = samples.mean(1) - stats.t.ppf(0.975, needed - 1) * stats.sem(samples, axis=1)
    assert np.mean(low > 0) == pytest.approx(0.8, abs=0.03)
    assert seeds_to_settle(interval(-1, 1)) is None
    assert seeds_to_settle(interval(-1.5, 2.5, seed_share=0.0)) is None


def test_ledger_round_trip(tmp_path):
    figures = {
        "06_best_of_n": CLAIMS["C6"].judge(interval(-0.05, -0.01)),
        "01_policy_size": CLAIMS["C1"].judge(interval(-2, 1.0)),
    }
    for figure, result in figures.items():
        ResultsFolder(figure, "smoke", tmp_path).write_claims([result])
        stored = json.loads((tmp_path / "smoke" / figure / "claims.json").read_text())
        assert [ClaimResult.from_json(entry) for entry in stored] == [result]
        assert stored[0]["claim"] == result.claim_id
        assert stored[0]["ci_low"] == next(iter(result.intervals.values())).low
    write_ledger(tmp_path / "smoke")
    table = pd.read_csv(tmp_path / "smoke" / "claims.csv")
    assert list(table["claim"]) == ["C1", "C6"]
    assert list(table["verdict"]) == ["inconclusive", "contradicted"]
    assert list(table["figure"]) == ["01_policy_size", "06_best_of_n"]
    assert table["ci_low"].tolist() == [-2, -0.05]
    assert table["num_seeds"].tolist() == [5, 5]
    assert table["seeds_to_settle"][0].startswith("about ")
    assert pd.isna(table["seeds_to_settle"][1])
    text = (tmp_path / "smoke" / "claims.md").read_text()
    assert "0 reproduced, 1 contradicted, 1 inconclusive." in text
    assert "| **contradicted** |" in text
    assert "(06_best_of_n/)" in text
    assert "4.4% to 1.9%" in text
    before = (tmp_path / "smoke" / "claims.csv").read_bytes()
    write_ledger(tmp_path / "smoke")
    assert (tmp_path / "smoke" / "claims.csv").read_bytes() == before


def test_an_empty_tier_has_an_empty_ledger(tmp_path):
    assert write_ledger(tmp_path).empty
    assert "0 reproduced" in (tmp_path / "claims.md").read_text()
