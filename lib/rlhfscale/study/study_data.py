"""From artifacts to tidy tables, for the figures of `sweeps_data`. Nothing here imports torch."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_saturation_exp, fit_with_intervals
from rlhfscale.study.rules import CLAIMS, MIX_CONFIDENCE, MIX_CONTRASTS, judge
from rlhfscale.study.study_sweeps import Collector, best_of_n_gain, last_updates, pair_accuracy
from rlhfscale.study.sweeps_data import CORNERS, KINDS, DataComposition, Mix, PromptsOrResponses, TrainingData
from rlhfscale.study.tables import (
    Folders,
    Runs,
    Tables,
    band_rows,
    mean_intervals,
    new_rng,
    per_prompt_table,
    read_metrics,
    read_responses,
)

NO_INTERVAL = {"ci_low": np.nan, "ci_high": np.nan}
"""Of an R2, which is bounded by 1: an interval that is symmetric about it would say nothing."""
SATURATED = 0.95
"""Share of the fitted rise at which a policy counts as on its plateau."""
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "d(a - b d)": lambda d: np.stack([d, -(d**2)], 1),
    "d(a - b log d)": lambda d: np.stack([d, -d * np.log(d)], 1),
}
"""Gold above the start as a function of the square root of the KL divergence, linear in a and b (Gao et al. 2023,
arXiv 2210.10760, found the first for best-of-N and the second for RL)."""


def training_data(P: TrainingData, folders: Folders) -> Tables:
    """C3: accuracy by training prompts, the plateau of a fitted saturation, and gold and proxy against KL."""
    found = Collector(P, folders)
    before = found.before()
    accuracy = []
    for updates in P.updates:
        policies = [P.policy(updates, seed) for seed in P.seeds]
        accuracy.append(found.after(policies, training_prompts=P.training_prompts(updates)))
    accuracy, sizes = np.array(accuracy), [P.training_prompts(updates) for updates in P.updates]
    for quantity, values in (("sampled_exact", accuracy), ("gain", accuracy - before)):
        for size, interval in zip(sizes, mean_intervals(values).split(), strict=True):
            found.summary.append(summary_row(quantity, interval, training_prompts=size))
    found.summary += _plateau(np.array([0, *sizes]), np.array([before, *accuracy]))
    quarter, most = accuracy[P.updates.index(P.quarter)], accuracy[-1]
    parts = nested_bootstrap((before, quarter, most), first_and_rest, rng=new_rng(), on="means").split()
    result = judge("C3", dict(zip(CLAIMS["C3"].rule.intervals, parts, strict=True)))
    for quantity, part in zip(("first_quarter", "rest_minus_half_of_first"), parts, strict=True):
        found.summary.append(summary_row(quantity, part) | {"verdict": result.verdict})
    found.summary.append(summary_row("proxy_of_the_rest", _proxy_of_the_rest(P, folders)))
    found.after(map(P.weak, P.seeds), training_prompts=P.training_prompts(P.weak_updates), kl_coefficient=P.weak_kl)
    curves = training_curves(P, folders)
    found.summary += over_optimisation(curves[curves["kl_coefficient"] == P.weak_kl])
    return found.tables(result, extra={"training.csv": curves})


def first_and_rest(means: np.ndarray) -> np.ndarray:
    """Of the accuracies before training, after a quarter of the data and after all: what the first quarter brought, and
    what the rest brought minus half of that."""
    before, quarter, most = means
    return np.array([quarter - before, (most - quarter) - (quarter - before) / 2])


def _plateau(sizes: np.ndarray, accuracy: np.ndarray) -> list[dict]:
    """Rows of the fitted saturation: its curve, where it ends, and the prompts at which 95% of its rise are reached."""
    fit = fit_with_intervals(fit_saturation_exp, sizes, accuracy, rng=new_rng())
    end, scale = fit.intervals["y_inf"], fit.intervals["x0"]
    reached = scale.map(lambda x0: -x0 * np.log(1 - SATURATED))
    rows = band_rows("saturation_fit", "training_prompts", fit, end)
    return [*rows, summary_row("saturation_level", end), summary_row("saturated_at_prompts", reached)]


def _proxy_of_the_rest(P: TrainingData, folders: Folders) -> Interval:
    """Proxy at the end of the longest run above that at the end of its first quarter, in s.d. of the score."""
    ends = [[last_updates(folders, P.policy(size, seed))["proxy"] for seed in P.seeds] for size in P.updates]
    ends = np.array(ends)
    return bootstrap(ends[-1] - ends[P.updates.index(P.quarter)], np.mean, unit="seed", rng=new_rng(), on="means")


def training_curves(P: TrainingData, folders: Folders) -> pd.DataFrame:
    """Every update of the longest and of the weakly held runs; gold above the SFT model's and proxy above the first
    update's, in standard deviations of single responses (the proxy is in such units already)."""
    columns, tables = ["update", "proxy", "gold", "exact", "kl_nats"], []
    for seed in P.seeds:
        start = read_responses(folders, P.before(seed)).gold
        for policy in (P.policy(P.updates[-1], seed), P.weak(seed)):
            table = read_metrics(folders, policy)[columns]
            table["gold_sd"] = (table["gold"] - start.mean()) / start.std()
            table["proxy_sd"] = table["proxy"] - table["proxy"].iloc[0]
            tables.append(table.assign(seed=seed, kl_coefficient=policy.kl_coefficient))
    return pd.concat(tables, ignore_index=True)


def over_optimisation(curves: pd.DataFrame) -> list[dict]:
    """Rows of gold against the square root of KL: parameters a and b of each of `FORMS`, its R2, and its curve."""
    by_update = {
        name: curves.pivot_table(index="update", columns="seed", values=name) for name in ("kl_nats", "gold_sd")
    }
    d = np.sqrt(np.maximum(by_update["kl_nats"].to_numpy(), 0.0))
    values = {"d": d, "gold": by_update["gold_sd"].to_numpy()}
    grid, rows = np.linspace(0.05, d.mean(1).max(), 40), []
    for form, terms in FORMS.items():

        def fitted(means: dict[str, np.ndarray], terms=terms) -> np.ndarray:
            moved = means["d"] > 0.02  # log d
            a_b, *_ = np.linalg.lstsq(terms(means["d"][moved]), means["gold"][moved], rcond=None)
            residual = means["gold"][moved] - terms(means["d"][moved]) @ a_b
            return np.array([*a_b, 1 - residual.var() / means["gold"][moved].var(), *(terms(grid) @ a_b)])

        parts = bootstrap(values, fitted, unit="seed", num_draws=500, rng=new_rng(), on="means").split()
        for name, part in zip(("a", "b", "r2"), parts, strict=False):
            row = summary_row(f"over_optimisation_{name}", part, form=form)
            rows.append(row | (NO_INTERVAL if name == "r2" else {}))
        for place, part in zip(grid, parts[3:], strict=True):
            rows.append(summary_row("over_optimisation_fit", part, form=form, root_kl=place))
    return rows


def prompts_or_responses(P: PromptsOrResponses, folders: Folders) -> Tables:
    """C4: accuracy within a prompt and best-of-N by cell, and what a doubling of prompts and of responses brings."""
    rows, summary, prompts = Runs(P), [], []
    drawn = read_responses(folders, P.samples)
    values = {"pair_accuracy": [], "best_of_n_gain": []}
    for labels, responses in P.cells():
        about = {"labels": labels, "responses_per_prompt": responses, "labelled_prompts": labels // responses}
        by_seed = {name: [] for name in values}
        for seed in P.seeds:
            model, scores = P.reward_model(labels, responses, seed), P.scores(labels, responses, seed)
            for name, spec, found in (
                ("pair_accuracy", model, pair_accuracy(folders, model)),
                ("best_of_n_gain", scores, best_of_n_gain(folders, scores, drawn.exact, P.best_of)),
            ):
                rows.add(
                    spec, {name: found.mean()}, rung=P.reward_model_rung, seed=seed, num_prompts=len(found), **about
                )
                prompts.append(per_prompt_table(spec, seed, name, found).assign(**about))
                by_seed[name].append(found)
        for name, found in by_seed.items():
            values[name].append(found)
    for name, cells in values.items():
        cells = np.array(cells)  # [cell, seed, prompt]
        for (labels, responses), interval in zip(P.cells(), mean_intervals(cells).split(), strict=True):
            about = {"labels": labels, "responses_per_prompt": responses, "labelled_prompts": labels // responses}
            summary.append(summary_row(name, interval, **about))
        parts = nested_bootstrap(cells, lambda means: doublings(P, means), rng=new_rng(), on="means").split()
        effects = dict(zip(("prompts", "responses", "difference", "interaction", "r2"), parts, strict=True))
        rows_of = {effect: summary_row(f"{name}_{effect}", part) for effect, part in effects.items()}
        rows_of["r2"] |= NO_INTERVAL
        if name == "pair_accuracy":
            result = judge("C4", effects["difference"])
            rows_of["difference"]["verdict"] = result.verdict
        summary += rows_of.values()
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts, ignore_index=True), (result,))


def doublings(P: PromptsOrResponses, means: np.ndarray) -> np.ndarray:
    """Of the fitted plane over the logs of prompts and responses: what a doubling of prompts brings, of responses, the
    difference; then the interaction of a fit that has one, and the plane's R2."""
    labels, responses = np.log2(np.array(P.cells(), float)).T
    x, y = labels - responses, responses
    plane = np.stack([np.ones_like(x), x - x.mean(), y - y.mean()], 1)
    (_, a, b), *_ = np.linalg.lstsq(plane, means, rcond=None)
    twisted = np.column_stack([plane, plane[:, 1] * plane[:, 2]])
    interaction = np.linalg.lstsq(twisted, means, rcond=None)[0][3]
    residual, spread = means - plane @ np.linalg.lstsq(plane, means, rcond=None)[0], means.var()
    return np.array([a, b, a - b, interaction, 1 - residual.var() / spread if spread else 0.0])


def data_composition(P: DataComposition, folders: Folders) -> Tables:
    """C7: accuracy within a prompt, best-of-N and PPO by mix and budget, contrasts between kinds, and what a larger
    budget brings to each."""
    found = Collector(P, folders)
    drawn = read_responses(folders, P.samples)
    values = {}
    for mix, prompts in P.cells():
        about = _shares(mix) | {"labelled_prompts": prompts}
        for seed in P.seeds:
            model, scores = P.reward_model(mix, prompts, seed), P.scores(mix, prompts, seed)
            for name, spec, value in (
                ("pair_accuracy", model, pair_accuracy(folders, model)),
                ("best_of_n_gain", scores, best_of_n_gain(folders, scores, drawn.exact, P.best_of)),
            ):
                values.setdefault((name, mix, prompts), []).append(value)
                found.add(spec, seed, name, value, **about)
    for (name, mix, prompts), by_seed in values.items():
        interval = mean_intervals(np.array(by_seed)[None]).split()[0]
        found.summary.append(summary_row(name, interval, **_shares(mix), labelled_prompts=prompts))
    small, large = P.labelled_prompts
    gains = {size: np.array([values["best_of_n_gain", mix, size] for mix in CORNERS]) for size in (small, large)}
    options = {"rng": new_rng(), "on": "means", "confidence": MIX_CONFIDENCE}
    parts = nested_bootstrap(gains[large], contrasts, **options).split()
    gain = nested_bootstrap(gains[large].mean(0), np.mean, **options)
    result = judge("C7", dict(zip(MIX_CONTRASTS, parts, strict=True)) | {"mean gain": gain})
    found.summary.append(summary_row("gain_in_all", gain, labelled_prompts=large))
    for contrast, part in zip(MIX_CONTRASTS, parts, strict=True):
        row = summary_row("contrast", part, contrast=contrast, labelled_prompts=large)
        found.summary.append(row | {"verdict": result.verdict})
    growth = gains[large] - gains[small]
    for kind, interval in zip(KINDS, mean_intervals(growth).split(), strict=True):
        found.summary.append(summary_row("larger_budget_gain", interval, kind=kind))
    for contrast, part in zip(MIX_CONTRASTS, nested_bootstrap(growth, contrasts, **options).split(), strict=True):
        found.summary.append(summary_row("larger_budget_contrast", part, contrast=contrast))
    before = found.before()[[P.seeds.index(seed) for seed in P.ppo_seeds]]
    for mix in P.mixes:
        about = _shares(mix) | {"labelled_prompts": large}
        gain = found.after([P.policy(mix, seed) for seed in P.ppo_seeds], **about) - before
        found.summary.append(summary_row("ppo_gain", mean_intervals(gain[None]).split()[0], **about))
    return found.tables(result)


def contrasts(means: np.ndarray) -> np.ndarray:
    """Differences between the kinds, in the order of `MIX_CONTRASTS`."""
    preference, rejection, process = means
    return np.array([preference - rejection, preference - process, rejection - process])


def _shares(mix: Mix) -> dict[str, float]:
    return {f"share_{kind.replace(' ', '_')}": share for kind, share in zip(KINDS, mix, strict=True)}
