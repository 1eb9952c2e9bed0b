"""What a test bed must show before a claim is tested on it: conditions about realism, never about a claim's direction.

Each function reads measured values and says whether a condition is met. They were fixed before any claim was looked at.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap


class Condition(NamedTuple):
    """One row of conditions.csv."""

    condition: str
    what: str
    measured: str
    threshold: str
    met: bool


def shown(interval: Interval, digits: int = 3) -> str:
    return f"{interval.estimate:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def least(intervals: Mapping[str, Interval], end: str = "estimate") -> str:
    """The entry with the lowest estimate, or the lowest end, as text."""
    name = min(intervals, key=lambda each: getattr(intervals[each], end))
    return f"{shown(intervals[name])} ({name})"


def loss_follows_a_power_law(r2: float, num_rungs: int) -> list[Condition]:
    what = "loss above the demonstrators' own follows a power law of compute: R2, and the number of rungs"
    return [Condition("a", what, f"{r2:.3f}, {num_rungs}", ">= 0.95, >= 6", r2 >= 0.95 and num_rungs >= 6)]


def sft_leaves_room(sampled: Mapping[str, Interval]) -> list[Condition]:
    low, high = (pick(sampled.values(), key=lambda each: each.estimate) for pick in (min, max))
    measured = f"{shown(low)} to {shown(high)}"
    return [
        Condition(
            "b",
            "sampled accuracy of the SFT models, from the lowest to the highest rung",
            measured,
            "from 0.15 to 0.5",
            low.estimate >= 0.15 and high.estimate <= 0.5,
        )
    ]


def no_temperature_does_as_well(margins: Mapping[str, Mapping[str, Interval]]) -> list[Condition]:
    """``margins``: by decoding and rung, accuracy after PPO minus that of the SFT model at its best temperature."""
    return [
        Condition(
            "b",
            f"{decoding} accuracy after PPO minus that of SFT at its best temperature: the least of all rungs",
            least(by_rung, "low"),
            "interval > 0",
            all(interval.low > 0 for interval in by_rung.values()),
        )
        for decoding, by_rung in margins.items()
    ]


def ppo_gains(gains: Mapping[str, Mapping[str, Interval]]) -> list[Condition]:
    """``gains``: by decoding and rung, accuracy after PPO minus before."""
    found = []
    for decoding, by_rung in gains.items():
        enough = sum(gain.estimate >= 0.1 and gain.low > 0 for gain in by_rung.values())
        what = f"rungs whose {decoding} accuracy PPO raises by 0.1 or more, interval above 0; the least gain"
        found.append(Condition("c", what, f"{enough} of {len(by_rung)}; {least(by_rung)}", ">= 5", enough >= 5))
    return found


def reward_models_range(found: Mapping[tuple[str, int], Interval], reference: str, rise: Interval) -> list[Condition]:
    """``found``: accuracy within a prompt, by rung and number of labelled prompts; ``rise`` from the smallest rung to
    the largest."""
    fewest, accuracy = min(labels for rung, labels in found if rung == reference), "accuracy within a prompt"
    few = found[reference, fewest]
    (rung, labels), best = max(found.items(), key=lambda each: each[1].estimate)
    which = f"{accuracy}, best reward model ({rung}, {labels:,} labelled prompts)"
    return [
        Condition("d", f"{accuracy}, {fewest:,} labelled prompts", shown(few), "<= 0.6", few.estimate <= 0.6),
        Condition("d", which, shown(best), ">= 0.9", best.estimate >= 0.9),
        Condition("d", f"{accuracy}, smallest to largest rung", shown(rise), ">= 0.08", rise.estimate >= 0.08),
    ]


def best_of_n_rises(sizes: Sequence[int], curve: np.ndarray, weakest: np.ndarray, rng) -> list[Condition]:
    """Best-of-N by the reference and by the weakest reward model, float64 [seed, prompt, size]."""
    sizes, means = list(sizes), curve.mean((0, 1))
    peak, turn = sizes[int(means.argmax())], sizes[int(weakest.mean((0, 1)).argmax())]
    eight, many = (curve[..., sizes.index(size)] for size in (min(8, max(sizes)), min(64, max(sizes))))
    at_eight = nested_bootstrap(eight, np.mean, rng=rng, on="means")
    change = nested_bootstrap(np.stack([eight, many]), lambda m: m[1] - m[0], rng=rng, on="means")
    level = at_eight.estimate + change.estimate
    return [
        Condition("e", "N at which best-of-N by the reference reward model is highest", str(peak), ">= 16", peak >= 16),
        Condition(
            "e",
            "best-of-64 minus best-of-8 by the reference reward model",
            shown(change),
            "best-of-64 above the lower end of best-of-8's interval",
            level >= at_eight.low,
        ),
        Condition("e", "the same N by the weakest reward model", str(turn), f"< {peak}", turn < peak),
    ]


def knowledge_is_there(coverage: Mapping[str, Interval], num_samples: int) -> list[Condition]:
    what = f"pass@{num_samples} of SFT models: the lowest"
    met = num_samples == 64 and all(interval.estimate >= 0.85 for interval in coverage.values())
    return [Condition("f", what, least(coverage), "pass@64 >= 0.85", met)]


def seeds_agree(gains: Mapping[str, np.ndarray]) -> list[Condition]:
    """``gains``: by rung, the gain in sampled accuracy of each seed, float64 [seed]."""
    ratios = {rung: float(values.std(ddof=1) / values.mean()) for rung, values in gains.items()}
    worst = max(ratios, key=lambda rung: (not 0 <= ratios[rung] <= 0.2, abs(ratios[rung])))
    what = "standard deviation over seeds of the gain, as a share of the gain: the largest of all rungs"
    bad = [ratio for ratio in ratios.values() if not 0 <= ratio <= 0.2]
    return [Condition("g", what, f"{ratios[worst]:.3f} ({worst})", "<= 0.2", not bad)]


def weak_kl_overoptimises(gold: np.ndarray, proxy: np.ndarray, rng) -> list[Condition]:
    """``gold`` and ``proxy``: float64 [seed, window of updates], of policies with a weak KL penalty.

    Where the gold reward is highest is decided for each seed on the other seeds, so that the fall is not a matter of
    having chosen the highest value.
    """
    num_seeds = len(gold)
    peaks = [int(np.delete(gold, seed, 0).mean(0).argmax()) for seed in range(num_seeds)]
    falls = np.array([gold[seed, peak] - gold[seed, -1] for seed, peak in enumerate(peaks)])
    rises = np.array([proxy[seed, -1] - proxy[seed, peak] for seed, peak in enumerate(peaks)])
    found = []
    for what, values in (
        ("with a weak KL penalty, fall of the gold accuracy from its peak to the end", falls),
        ("rise of the reward model's score meanwhile", rises),
    ):
        interval = bootstrap(values, np.mean, unit="seed", rng=rng, on="means")
        found.append(Condition("h", what, shown(interval), "interval > 0", interval.low > 0))
    return found


def enough_seeds(num_seeds: int) -> list[Condition]:
    return [Condition("i", "seeds of every reward model and policy", str(num_seeds), ">= 5", num_seeds >= 5)]


def enough_bases(num_bases: Mapping[str, int], shares: Mapping[str, float]) -> list[Condition]:
    """``num_bases`` by rung up to 330k; ``shares``: of the variance of the gain, from `variance_shares`."""
    split = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    met = min(num_bases.values()) >= 3
    return [Condition("j", f"pretraining seeds of rungs up to 330k (variance of the gain: {split})",
                      str(min(num_bases.values())), ">= 3", met)]  # fmt: skip


def variance_shares(gains: np.ndarray) -> dict[str, float]:
    """Shares of the variance of a single gain: of the base, of the seed, and of the rest.

    Args:
        gains: float64 [base, seed], each seed's labels, reward model and policy crossed with each base.

    A two-way random-effects layout without repetition, by expected mean squares; negative components count as 0.
    """
    num_bases, num_seeds = gains.shape
    by_base, by_seed = gains.mean(1, keepdims=True), gains.mean(0, keepdims=True)
    rest = ((gains - by_base - by_seed + gains.mean()) ** 2).sum() / ((num_bases - 1) * (num_seeds - 1))
    base = max(0.0, by_base.var(ddof=1) - rest / num_seeds)
    seed = max(0.0, by_seed.var(ddof=1) - rest / num_bases)
    parts = {"base": base, "seed": seed, "rest": rest}
    total = sum(parts.values()) or 1.0
    return {name: float(part / total) for name, part in parts.items()}
