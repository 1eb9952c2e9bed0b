"""From artifacts to tidy tables, for the figures of `sweeps`. Nothing here imports torch."""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from rlhfscale.bed.recipe import num_params
from rlhfscale.evals import best_of_n as bon
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study import roles
from rlhfscale.study.rules import CLAIMS, EQUIVALENCE_MARGIN, ClaimResult, judge
from rlhfscale.study.sweeps import Algorithms, LearningRates, OnePolicy, ResponsesPerPrompt, RewardModelSize
from rlhfscale.study.tables import (
    Folders,
    Runs,
    Tables,
    band_rows,
    mean_intervals,
    mean_where_known,
    new_rng,
    per_prompt_table,
    read_metrics,
    read_responses,
    read_scores,
)

LAST_UPDATES = 5
"""Updates at the end of training over which KL and proxy are averaged."""


def reward_model_size(P: RewardModelSize, folders: Folders) -> Tables:
    """C2: pair accuracy, best-of-N gain and PPO gain by reward-model rung, and their slopes per doubling."""
    found = Collector(P, folders)
    rungs, sizes = P.reward_model_rungs, [num_params(rung) for rung in P.reward_model_rungs]
    about = {rung: {"reward_model": rung, "reward_model_params": size} for rung, size in zip(rungs, sizes, strict=True)}
    drawn, before = read_responses(folders, P.samples), found.before()
    pairs, best, after = [], [], []
    for rung in rungs:
        accuracy = {seed: pair_accuracy(folders, P.reward_model(rung, seed)) for seed in P.seeds}
        for seed, values in accuracy.items():
            found.add(P.reward_model(rung, seed), seed, "pair_accuracy", values, rung=rung, **about[rung])
        pairs.append([*accuracy.values()])
        gain = [best_of_n_gain(folders, P.scores(rung, seed), drawn.exact, P.best_of) for seed in P.seeds]
        for seed, values in zip(P.seeds, gain, strict=True):
            found.add(P.scores(rung, seed), seed, "best_of_n_gain", values, num_responses=P.best_of, **about[rung])
        best.append(gain)
        after.append(found.after([P.policy(rung, seed) for seed in P.seeds], **about[rung]))
    values = {
        "pair_accuracy": np.array(pairs),
        "best_of_n_gain": np.array(best),
        "ppo_gain": np.array(after) - before,
    }
    slopes = {}
    for name, array in values.items():
        for rung, interval in zip(rungs, mean_intervals(array).split(), strict=True):
            found.summary.append(summary_row(name, interval, **about[rung]))
        slope = partial(slope_per_doubling, sizes)
        slopes[name] = nested_bootstrap(array, slope, rng=new_rng(), on="means")
        found.summary.append(summary_row(f"{name}_slope", slopes[name]))
        fit = fit_with_intervals(fit_slope, np.array(sizes), array, rng=new_rng())
        found.summary += band_rows(f"{name}_fit", "reward_model_params", fit, slopes[name])
    difference = nested_bootstrap(
        values["best_of_n_gain"] - values["ppo_gain"],
        lambda means: slope_per_doubling(sizes, means),
        rng=new_rng(),
        on="means",
    )
    intervals = dict(zip(CLAIMS["C2"].rule.intervals, (slopes["ppo_gain"], difference), strict=True))
    result = judge("C2", intervals)
    found.summary.append(summary_row("slope_difference", difference) | {"verdict": result.verdict})
    return found.tables(result)


def best_of_n_gain(folders: Folders, scores: roles.Scores, exact: np.ndarray, size: int) -> np.ndarray:
    """What best-of-N by a reward model's scores gains over one response, float64 [prompt]; ``exact`` is
    [prompt, sample]."""
    return bon.best_of_n(exact, read_scores(folders, scores), [size])[:, 0] - exact.mean(1)


def pair_accuracy(folders: Folders, spec: roles.RewardModel) -> np.ndarray:
    """Accuracy within each held-out prompt that has a pair of unequal gold, float64 [prompt]; these are the same for
    every reward model of a recipe, as they depend on the responses alone."""
    found = load_file(folders[spec] / "held_out.safetensors")["pair_accuracy"]  # [label rung, prompt], or [prompt]
    accuracy = mean_where_known(np.atleast_2d(found))
    return accuracy[~np.isnan(accuracy)]


def last_updates(folders: Folders, policy: roles.Policy) -> pd.Series:
    """Means of a policy's metrics over its last updates."""
    return read_metrics(folders, policy).tail(LAST_UPDATES).mean()


def responses_per_prompt(P: ResponsesPerPrompt, folders: Folders) -> Tables:
    """C5: accuracy by ladder and responses per prompt, the gain of each doubling, and the claim's two statistics."""
    found = Collector(P, folders)
    before = found.before()
    for name, sizes in P.ladders().items():
        accuracy = []
        for size in sizes:
            policies = [P.policy(name, size, seed) for seed in P.seeds]
            accuracy.append(found.after(policies, ladder=name, responses_per_prompt=size))
        accuracy = np.array(accuracy)
        found.by_size("sampled_exact", accuracy, sizes, ladder=name)
        found.by_size("gain", accuracy - before, sizes, ladder=name)
        found.by_size("doubling_gain", np.diff(accuracy, axis=0), sizes[1:], ladder=name)
        if name == "ppo, equal prompts":
            parts = nested_bootstrap(accuracy, first_and_last_doubling, rng=new_rng(), on="means").split()
            result = judge("C5", dict(zip(CLAIMS["C5"].rule.intervals, parts, strict=True)))
            for quantity, part in zip(("first_doublings", "last_minus_half_of_first"), parts, strict=True):
                row = summary_row(quantity, part, ladder=name, responses_per_prompt=max(sizes))
                found.summary.append(row | {"verdict": result.verdict})
    extra = {"cost.csv": cost(P, folders)}
    return found.tables(result, extra=extra)


def first_and_last_doubling(means: np.ndarray) -> np.ndarray:
    """Of accuracies at 1, 2, 4, ... responses: the mean gain of the first two doublings, and the gain of the last one
    minus half of that."""
    doublings = np.diff(means)
    first = doublings[:2].mean()
    return np.array([first, doublings[-1] - first / 2])


def algorithms(P: Algorithms, folders: Folders) -> Tables:
    """C9: accuracy by algorithm and responses per prompt at equal roll-outs, and each algorithm's distance from PPO."""
    found = Collector(P, folders)
    before, accuracy = found.before(), {}
    for name in P.algorithms:
        cells = []
        for size in P.responses:
            policies = [P.policy(name, size, seed) for seed in P.seeds]
            cells.append(found.after(policies, algorithm=name, responses_per_prompt=size))
        accuracy[name] = np.array(cells)
        found.by_size("sampled_exact", accuracy[name], P.responses, algorithm=name)
        found.by_size("gain", accuracy[name] - before, P.responses, algorithm=name)
    for name in (name for name in P.algorithms if name != "ppo"):
        difference = accuracy[name] - accuracy["ppo"]
        found.by_size("minus_ppo", difference, P.responses, algorithm=name)
        whole = nested_bootstrap(difference.mean(0), np.mean, rng=new_rng(), on="means")
        row = summary_row("minus_ppo_in_all", whole, algorithm=name)
        row |= {"margin": EQUIVALENCE_MARGIN, "equivalent": bool(max(-whole.low, whole.high) < EQUIVALENCE_MARGIN)}
        if name == "grpo":
            gain = nested_bootstrap((accuracy["ppo"] - before).mean(0), np.mean, rng=new_rng(), on="means")
            found.summary.append(summary_row("gain_in_all", gain, algorithm="ppo"))
            result = judge("C9", dict(zip(CLAIMS["C9"].rule.intervals, (whole, gain), strict=True)))
            row |= {"verdict": result.verdict}
        found.summary.append(row)
    timed = {}
    for name in P.algorithms:
        timed[name] = _in_equal_time(P, found, name, accuracy[name])
        if name != "ppo":
            difference = nested_bootstrap(timed[name] - timed["ppo"], np.mean, rng=new_rng(), on="means")
            row = summary_row("minus_ppo_in_equal_time", difference, algorithm=name)
            found.summary.append(row | {"responses_per_prompt": P.equal_time_responses})
    extra = {"training.csv": learning_curves(P, folders), "cost.csv": cost(P, folders)}
    return found.tables(result, extra=extra)


def _in_equal_time(P: Algorithms, found: "Collector", name: str, equal_rollouts: np.ndarray) -> np.ndarray:
    """Accuracy [seed, prompt] of the policies that had as long as the other algorithms'; adds their rows, unless they
    are among those of equal roll-outs [responses, seed, prompt]."""
    policies = [P.in_equal_time(name, seed) for seed in P.seeds]
    if policies[0] in P.equal_rollouts():
        return equal_rollouts[P.responses.index(P.equal_time_responses)]
    return found.after(policies, algorithm=name, num_updates=policies[0].num_updates)


def learning_curves(P: Algorithms, folders: Folders) -> pd.DataFrame:
    """Every update of every policy, as `plots_sweeps.learning_curves` wants it."""
    columns = ["update", "proxy", "gold", "exact", "kl_nats", "response_tokens", "finished"]
    return pd.concat(
        [read_metrics(folders, p)[columns].assign(**_about(p)) for p in P.equal_rollouts()],
        ignore_index=True,
    )


def cost(P: OnePolicy, folders: Folders) -> pd.DataFrame:
    """Roll-outs and seconds that each policy's training took, on the machine and in the company it was run in."""
    rows = []
    for policy in P.policies():
        made = json.loads((folders[policy] / "manifest.json").read_text())
        rollouts = policy.num_updates * policy.prompts_per_update * policy.responses_per_prompt
        about = _about(policy) | {"updates": policy.num_updates, "rollouts": rollouts}
        rows.append(about | {"wall_s": made["wall_s"], "cpu_s": made["cpu_s"]})
    return pd.DataFrame(rows)


def mean_cost(costs: pd.DataFrame) -> pd.DataFrame:
    """The table of `cost`, mean over seeds."""
    by = ["algorithm", "prompts", "responses_per_prompt", "updates"]
    return costs.groupby(by).mean().drop(columns="seed").round(1)


def _about(policy: roles.Policy) -> dict[str, Any]:
    return {
        "algorithm": policy.algorithm,
        "prompts": policy.prompts_per_update,
        "responses_per_prompt": policy.responses_per_prompt,
        "seed": policy.seed,
    }


def learning_rates(P: LearningRates, folders: Folders) -> Tables:
    """Accuracy by algorithm, rung and rate, and its distance from that at the common rate, the recipe's of PPO.

    Two seeds make no interval over seeds: intervals are over prompts, for these very policies.
    """
    rows, summary, prompts = Runs(P), [], []
    for algorithm, rung in P.cells():
        exact = {}
        for rate in P.rates:
            about = {"algorithm": algorithm, "policy_lr": rate}
            by_seed = []
            for seed in P.seeds:
                spec = P.evaluation(P.policy(algorithm, rung, rate, seed))
                by_seed.append(read_responses(folders, spec).exact.mean(1))
                values = by_seed[-1]
                rows.add(spec, {"sampled_exact": values.mean()}, rung=rung, seed=seed, num_prompts=len(values), **about)
                prompts.append(per_prompt_table(spec, seed, "sampled_exact", values).assign(rung=rung, **about))
            exact[rate] = np.mean(by_seed, axis=0)
        for rate, values in exact.items():
            about = {
                "algorithm": algorithm,
                "rung": rung,
                "num_params": num_params(rung),
                "policy_lr": rate,
            }
            for name, found in (("sampled_exact", values), ("minus_common", values - exact[P.common_rate])):
                interval = bootstrap(found, np.mean, unit="prompt", rng=new_rng(), on="means")
                summary.append(summary_row(name, interval, **about))
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts, ignore_index=True))


class Collector:
    """Collects the tables of a figure whose policies are all of one rung."""

    def __init__(self, P: OnePolicy, folders: Folders):
        self.P, self.folders = P, folders
        self.rows, self.summary, self.prompts = Runs(P), [], []

    def before(self) -> np.ndarray:
        """Sampled accuracy of the SFT model, float64 [seed, prompt]; adds its rows."""
        values = [self.sampled(self.P.before(seed), seed, stage="sft") for seed in self.P.seeds]
        mean = mean_intervals(np.array(values)[None]).split()[0]
        self.summary.append(summary_row("sampled_exact", mean, stage="sft"))
        return np.array(values)

    def after(self, policies: Iterable[roles.Policy], **about: Any) -> np.ndarray:
        """Sampled accuracy of a cell's policies, one for each seed, float64 [seed, prompt]; adds their rows."""
        values = []
        for policy in policies:
            values.append(self.sampled(self.P.evaluation(policy), policy.seed, stage=policy.algorithm, **about))
            last = last_updates(self.folders, policy)
            training = {"kl_nats": last["kl_nats"], "proxy": last["proxy"]}
            counted = {"seed": policy.seed, "num_prompts": policy.prompts_per_update}
            self.rows.add(policy, training, rung=self.P.policy_rung, stage=policy.algorithm, **about, **counted)
        return np.array(values)

    def sampled(self, spec: roles.Samples, seed: int, *, rung: str | None = None, **about: Any) -> np.ndarray:
        """Sampled accuracy of a model, float64 [prompt]; adds its rows."""
        rung = rung or self.P.policy_rung
        responses = read_responses(self.folders, spec)
        values = responses.exact.mean(1)
        self.add(spec, seed, "sampled_exact", values, rung=rung, **about)
        others = {
            "sampled_gold": responses.gold.mean(),
            "finished": responses.finished.mean(),
            "response_tokens": responses.response_lengths.mean(),
        }
        self.rows.add(spec, others, rung=rung, seed=seed, num_prompts=len(values), **about)
        return values

    def add(
        self, spec: Spec, seed: int, metric: str, values: np.ndarray, *, rung: str | None = None, **about: Any
    ) -> None:
        """A run's mean and its values by prompt."""
        rung = rung or self.P.policy_rung
        self.rows.add(spec, {metric: values.mean()}, rung=rung, seed=seed, num_prompts=len(values), **about)
        self.prompts.append(per_prompt_table(spec, seed, metric, values).assign(**about))

    def by_size(self, quantity: str, values: np.ndarray, sizes: Sequence[int], **about: Any) -> None:
        """A summary row for each number of responses; values are float64 [size, seed, prompt]."""
        for size, interval in zip(sizes, mean_intervals(values).split(), strict=True):
            self.summary.append(summary_row(quantity, interval, responses_per_prompt=size, **about))

    def seeds_alone(self, quantity: str, values: Sequence[float], **about: Any) -> None:
        """A summary row of a number that has no values by prompt, float64 [seed]."""
        interval = bootstrap(np.asarray(values), np.mean, unit="seed", rng=new_rng(), on="means")
        self.summary.append(summary_row(quantity, interval, **about))

    def tables(self, result: ClaimResult, extra: dict[str, pd.DataFrame] | None = None) -> Tables:
        prompts = pd.concat(self.prompts, ignore_index=True)
        return Tables(self.rows.table(), pd.DataFrame(self.summary), prompts, (result,), extra or {})
