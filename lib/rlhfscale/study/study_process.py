"""From artifacts to tidy tables, for the figure of `sweeps_process`. Nothing here imports torch."""

import numpy as np
from safetensors.numpy import load_file

from rlhfscale.bed import ladder
from rlhfscale.bed.recipe import FAMILIES
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.stats.fits import slope_per_doubling
from rlhfscale.study.rules import CLAIMS, judge
from rlhfscale.study.study_sweeps import Collector, best_of_n_gain
from rlhfscale.study.sweeps_process import EVERY, KINDS, TRAINED_ON, ProcessSupervision
from rlhfscale.study.tables import Folders, Tables, mean_intervals, new_rng, read_responses

ROLES = ("own", "other", EVERY)
"""Training data as a held-out prompt sees it: of its own family, of the other one, of both."""


def process_supervision(P: ProcessSupervision, folders: Folders) -> Tables:
    """C8: best-of-N by kind of supervision and training data, step errors found, and PPO against either kind."""
    found = Collector(P, folders)
    drawn = read_responses(folders, P.samples)
    gains = {kind: _gains(P, kind, found, drawn.exact, drawn.family) for kind in KINDS}  # [role, rung, seed, prompt]
    sizes = np.array([ladder.rung(rung).num_params for rung in P.reward_model_rungs], float)
    for kind, values in gains.items():
        for role, by_rung in zip(ROLES, values, strict=True):
            about = {"kind": kind, "trained_on": role}
            for rung, interval in zip(P.reward_model_rungs, mean_intervals(by_rung).split(), strict=True):
                params = {"reward_model": rung, "reward_model_params": ladder.rung(rung).num_params}
                found.summary.append(summary_row("best_of_n_gain", interval, **params, **about))
            slope = nested_bootstrap(by_rung, lambda m: slope_per_doubling(sizes, m), rng=new_rng(), on="means")
            found.summary.append(summary_row("best_of_n_slope", slope, **about))
    difference = (gains["process"] - gains["outcome"]).mean(1)  # [role, seed, prompt]
    parts = dict(zip(ROLES, mean_intervals(difference).split(), strict=True))
    result = judge("C8", dict(zip(CLAIMS["C8"].rule.intervals, (parts["own"], parts["other"]), strict=True)))
    for role, part in parts.items():
        found.summary.append(summary_row("process_minus_outcome", part, trained_on=role) | {"verdict": result.verdict})
    own, other, every = (gains["process"].mean(1)[ROLES.index(role)] for role in ("own", "other", EVERY))
    for quantity, values in (("loss_of_transfer", own - other), ("diversity_effect", every - (own + other) / 2)):
        interval = nested_bootstrap(values, np.mean, rng=new_rng(), on="means")
        found.summary.append(summary_row(quantity, interval, kind="process"))
    _step_errors(P, found)
    _ppo(P, found)
    return found.tables(result)


def _gains(P: ProcessSupervision, kind: str, found: Collector, exact: np.ndarray, family: np.ndarray) -> np.ndarray:
    """Best-of-N above one response, float64 [role, rung, seed, prompt]; adds rows by family and training data."""
    by_data = {}
    for rung in P.reward_model_rungs:
        for trained_on in TRAINED_ON:
            for seed in P.seeds:
                spec = P.scores(kind, rung, trained_on, seed)
                gain = best_of_n_gain(found.folders, spec, exact, P.best_of)
                by_data[rung, trained_on, seed] = gain
                about = {"kind": kind, "data": trained_on, "reward_model": rung}
                about |= {"reward_model_params": ladder.rung(rung).num_params}
                found.add(spec, seed, "best_of_n_gain", gain, **about)
    values = np.empty((len(ROLES), len(P.reward_model_rungs), len(P.seeds), len(exact)))
    at = family, np.arange(len(exact))
    for r, rung in enumerate(P.reward_model_rungs):
        for s, seed in enumerate(P.seeds):
            of = {name: by_data[rung, name, seed] for name in TRAINED_ON}
            values[0, r, s] = np.stack([of[name] for name in FAMILIES])[at]
            others = [[of[name] for name in FAMILIES if name != own] for own in FAMILIES]
            values[1, r, s] = np.mean(others, axis=1)[at]
            values[2, r, s] = of[EVERY]
    return values


def _step_errors(P: ProcessSupervision, found: Collector) -> None:
    """Rows of how well process reward models find the first wrong step of held-out responses."""
    for rung in P.reward_model_rungs:
        for trained_on in TRAINED_ON:
            by_seed = []
            for seed in P.seeds:
                spec = P.reward_model("process", rung, trained_on, seed)
                held_out = load_file(found.folders[spec] / "held_out.safetensors")
                by_family = [_f1(held_out, held_out["family"] == index) for index in range(len(FAMILIES))]
                for family, value in zip(FAMILIES, by_family, strict=True):
                    about = {"kind": "process", "data": trained_on, "family": family, "reward_model": rung}
                    count = int((held_out["family"] == FAMILIES.index(family)).sum())
                    metrics = {"first_error_f1": value}
                    found.rows.add(spec, metrics, rung=P.policy_rung, seed=seed, num_prompts=count, **about)
                by_seed.append(by_family)
            about = {"kind": "process", "data": trained_on, "reward_model": rung}
            about |= {"reward_model_params": ladder.rung(rung).num_params}
            for family, values in zip(FAMILIES, np.transpose(by_seed), strict=True):
                found.seeds_alone("first_error_f1", values, family=family, **about)


def _f1(held_out: dict[str, np.ndarray], chosen: np.ndarray) -> float:
    """Harmonic mean of two shares: of responses with a wrong step those whose first one was found, and of those without
    one those in which none was found (Zheng et al. 2024, ProcessBench, arXiv 2412.06559)."""
    wrong, hit = held_out["first_wrong"] >= 0, held_out["first_wrong_found"] == held_out["first_wrong"]
    found, clean = (hit[kind].mean() if kind.any() else 0.0 for kind in (chosen & wrong, chosen & ~wrong))
    return float(2 * found * clean / (found + clean)) if found and clean else 0.0


def _ppo(P: ProcessSupervision, found: Collector) -> None:
    """Rows of PPO against either kind of reward model, of `ppo_rung` and trained on every family."""
    before = found.before()
    gains = []
    for kind in KINDS:
        gains.append(found.after([P.policy(kind, seed) for seed in P.seeds], kind=kind, data=EVERY) - before)
    for kind, interval in zip(KINDS, mean_intervals(np.array(gains)).split(), strict=True):
        found.summary.append(summary_row("ppo_gain", interval, kind=kind))
    difference = nested_bootstrap(gains[1] - gains[0], np.mean, rng=new_rng(), on="means")
    found.summary.append(summary_row("ppo_process_minus_outcome", difference))
