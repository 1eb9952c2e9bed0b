"""From artifacts to tidy tables, for the figure of `sweeps_compute`. Nothing here imports torch."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from rlhfscale.bed import flops as stage_flops
from rlhfscale.bed import specs
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_power_law, fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study.rules import CLAIMS, judge
from rlhfscale.study.study_sweeps import Collector
from rlhfscale.study.sweeps_compute import ComputeReturns
from rlhfscale.study.tables import Folders, Tables, band_rows, mean_intervals, new_rng


def compute_returns(P: ComputeReturns, folders: Folders) -> Tables:
    """C10: accuracy by compute for pretraining (more documents; larger rungs) and RLHF, and the slopes per doubling."""
    found = Collector(P, folders)
    costs = pd.concat([_pretraining_costs(P, folders), _rlhf_costs(P, folders)], ignore_index=True)
    flops = costs.groupby(["spent_on", "size"], sort=False)["flops"].sum()
    accuracy = {name: _sampled(P, found, name, models) for name, models in P.pretraining().items()}
    trained = [[P.policy(size, seed) for seed in P.seeds] for size in P.updates]
    accuracy["RLHF"] = np.array(
        [found.after(policies, spent_on="RLHF", size=size) for size, policies in zip(P.updates, trained, strict=True)]
    )
    for name, values in accuracy.items():
        x = flops[name].to_numpy()
        for place, size, interval in zip(x, flops[name].index, mean_intervals(values).split(), strict=True):
            found.summary.append(summary_row("sampled_exact", interval, spent_on=name, size=size, flops=place))
        slope = nested_bootstrap(values, partial(slope_per_doubling, x), rng=new_rng(), on="means")
        found.summary.append(summary_row("slope", slope, spent_on=name))
        fit = fit_with_intervals(fit_slope, x, values, rng=new_rng())
        found.summary += [row | {"spent_on": name} for row in band_rows("slope_fit", "flops", fit, slope)]
        error = fit_with_intervals(fit_power_law, x, 1 - values, rng=new_rng())
        about = {"spent_on": name, "r2": error.r2_log}
        found.summary.append(summary_row("error_exponent", error.intervals["b"], **about))
    both = tuple(accuracy[name] for name in ("pretraining", "RLHF"))
    axes = [flops[name].to_numpy() for name in ("pretraining", "RLHF")]
    parts = nested_bootstrap(both, lambda means: _compared(axes, means), rng=new_rng(), on="means").split()
    result = judge("C10", dict(zip(CLAIMS["C10"].rule.intervals, parts, strict=True)))
    found.summary.append(summary_row("slope_difference", parts[0]) | {"verdict": result.verdict})
    return found.tables(result, extra={"flops.csv": costs})


def _compared(axes: Sequence[np.ndarray], means: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Slope of pretraining minus that of RLHF, and the slope of pretraining alone."""
    pretraining, rlhf = (slope_per_doubling(x, m) for x, m in zip(axes, means, strict=True))
    return np.array([pretraining - rlhf, pretraining])


def _sampled(P: ComputeReturns, found: Collector, spent_on: str, models: Mapping[int, specs.SFT]) -> np.ndarray:
    """Accuracy of models by size, float64 [model, seed, prompt]; seeds are those of the evaluation."""
    cells = []
    for size, model in models.items():
        about = {"stage": "sft", "spent_on": spent_on, "size": size}
        cells.append([found.sampled(P.sampled(model, seed), seed, rung=model.rung, **about) for seed in P.seeds])
    return np.array(cells)


def _pretraining_costs(P: ComputeReturns, folders: Folders) -> pd.DataFrame:
    rows = []
    for spent_on, models in P.pretraining().items():
        for size, model in models.items():
            last = pd.read_csv(folders[model.base] / "loss.csv").iloc[-1]
            rows.append({"spent_on": spent_on, "size": size, "part": "pretraining", "flops": last["flops"]})
    return pd.DataFrame(rows)


def _rlhf_costs(P: ComputeReturns, folders: Folders) -> pd.DataFrame:
    """FLOPs by part, mean over seeds: sampling what is labelled, the reward model, and all of PPO."""
    rows = []
    for size in P.updates:
        parts = []
        for policy in (P.policy(size, seed) for seed in P.seeds):
            model = policy.reward_model
            labels = sum(stage_flops.samples_flops(source, folders) for source in model.data)
            training = stage_flops.reward_model_flops(model, folders)
            parts.append({"labels": labels, "reward model": training} | stage_flops.policy_flops(policy, folders))
        for part, flops in pd.DataFrame(parts).mean().items():
            rows.append({"spent_on": "RLHF", "size": size, "part": part, "flops": flops})
    return pd.DataFrame(rows)
