"""From artifacts to tidy tables: one function for each figure. Nothing here imports torch.

Each takes the figure's parameters and the artifact folders by spec, and returns `Tables`. Accuracies are means over a
prompt's samples first; intervals then resample seeds and prompts (see `stats.bootstrap`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from rlhfscale.bed import tasks
from rlhfscale.bed.demonstrations import demonstration_nats, held_out_documents
from rlhfscale.bed.recipe import num_params
from rlhfscale.bed.responses import Responses
from rlhfscale.chat import specs as chat_specs
from rlhfscale.evals import alpaca_eval, planted
from rlhfscale.evals import best_of_n as bon
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_power_law, fit_slope, fit_with_intervals, slope_per_doubling
from rlhfscale.study import roles
from rlhfscale.study.figures import Benchmarks, BestOfN, PolicySize, RecipeFigure, StudyFigure, TestBed, Walkthrough
from rlhfscale.study.params import load as load_params
from rlhfscale.study.results import ResultsFolder
from rlhfscale.study.rules import CLAIMS, ClaimResult, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rlhfscale.chat.answers import Answers
    from rlhfscale.runs.grid import Results

Folders = Mapping[Spec, Path]
CUSTOM = "custom"
"""Results folder of parameters that are no tier's."""
BOOTSTRAP_SEED = 20241209
"""Seed of every bootstrap: the same tables come out of the same artifacts."""


@dataclass(frozen=True)
class Tables:
    """What a figure is drawn from.

    Attributes:
        runs: one row for each run, seed and metric (columns: see `results.RUNS_COLUMNS`).
        summary: one row for each estimate with its interval (`results.SUMMARY_COLUMNS`).
        per_prompt: the values behind the intervals (`results.PER_PROMPT_COLUMNS`).
        claims: verdicts.
        extra: further tables by file name.
    """

    runs: pd.DataFrame
    summary: pd.DataFrame
    per_prompt: pd.DataFrame
    claims: tuple[ClaimResult, ...] = ()
    extra: dict[str, pd.DataFrame] = field(default_factory=dict)


def save(P: RecipeFigure, tables: Tables, pictures: Mapping[str, "Figure"], folders: "Results", wall_s: float) -> Path:
    """Write everything of a figure to results/<tier>/<figure>/ and return that folder.

    Args:
        P: the figure's parameters; their recipe names the tier.
        tables: what `policy_size`, `best_of_n`, `test_bed` or `walkthrough` returned.
        pictures: matplotlib figures by file name without suffix.
        folders: what `grid.ensure` returned for the figure's specs.
        wall_s: seconds that the notebook took, for the manifest.
    """
    folder = ResultsFolder(P.figure, tier=tier(P))
    folder.write_runs(tables.runs)
    folder.write_summary(tables.summary)
    folder.write_per_prompt(tables.per_prompt)
    for name, table in tables.extra.items():
        folder.write_table(name, table)
    for name, picture in pictures.items():
        folder.write_figure(picture, name)
    if tables.claims:
        folder.write_claims(tables.claims)
    roots = P.specs()
    ancestors = {spec.key for root in roots for spec in root.walk()}
    folder.write_manifest(
        P.resolved() | {"recipe_settings": P.settings.model_dump(mode="json")},
        folders.store.manifests(ancestors) if roots else {},
        command=command(P),
        seeds=P.seeds,
        wall_s=wall_s,
    )
    return folder.path


def command(P: RecipeFigure) -> str:
    """What makes a figure with these parameters."""
    if tier(P) == CUSTOM:
        return f"notebooks/{P.figure}.ipynb with the parameters in manifest.json"
    return f"make figures TIER={P.recipe} FIGURE={P.figure}"


def tier(P: RecipeFigure) -> str:
    """The tier whose file holds just these parameters, else CUSTOM: playing must not overwrite a tier's results."""
    return P.recipe if load_params(P.figure, P.recipe) == P else CUSTOM


def verdicts(tables: Tables) -> pd.DataFrame:
    """The claims' verdicts, for reading in a notebook."""
    rows = []
    for result in tables.claims:
        claim = CLAIMS[result.claim_id]
        for name in claim.rule.intervals:
            found = result.intervals[name]
            interval = f"[{found.low:.4f}, {found.high:.4f}]"
            rule = {"all": " and ", "any": " or "}[claim.rule.combine].join(
                part.describe() for part in claim.rule.parts if part.interval == name
            )
            rows.append([claim.id, claim.statement, f"{found.estimate:.4f}", interval, rule, result.verdict])
    return pd.DataFrame(rows, columns=["claim", "statement", "estimate", "95% interval", "reproduced if", "verdict"])


def policy_size(P: PolicySize, folders: Folders) -> Tables:
    """C1: accuracy before and after PPO by policy rung and seed, gains, and their slope per doubling of parameters."""
    rows, prompts, cells = Runs(P), [], {}
    for stage in ("sft", "ppo"):
        for rung in P.policy_rungs:
            for seed in P.seeds:
                sampled_spec, greedy_spec = P.evaluations(stage, rung, seed)
                sampled, greedy = (read_responses(folders, spec) for spec in (sampled_spec, greedy_spec))
                cells[stage, rung, seed] = sampled.exact.mean(1)
                about = {"rung": rung, "stage": stage, "seed": seed, "num_prompts": sampled.num_prompts}
                metrics = {
                    "sampled_exact": sampled.exact.mean(),
                    "sampled_gold": sampled.gold.mean(),
                    "finished": sampled.finished.mean(),
                    "response_tokens": sampled.response_lengths.mean(),
                }
                rows.add(sampled_spec, metrics, **about)
                if stage == "ppo":
                    last = read_metrics(folders, sampled_spec.model).tail(5).mean()
                    training = {"kl_nats": last["kl_nats"], "proxy": last["proxy"]}
                    rows.add(sampled_spec.model, training, **about | {"num_prompts": P.settings.ppo_prompts})
                if stage == "ppo" or seed == P.seeds[0]:  # before training, greedy is one run for all seeds
                    rows.add(greedy_spec, {"greedy_exact": greedy.exact.mean()}, **about)
                per_prompt = per_prompt_table(sampled_spec, seed, "sampled_exact", cells[stage, rung, seed])
                prompts.append(per_prompt.assign(stage=stage, rung=rung))
    accuracy = {
        stage: np.array([[cells[stage, rung, seed] for seed in P.seeds] for rung in P.policy_rungs])
        for stage in ("sft", "ppo")
    }
    sizes = np.array([num_params(rung) for rung in P.policy_rungs])
    summary = []
    for stage, values in accuracy.items():
        summary += rung_rows("sampled_exact", P.policy_rungs, mean_intervals(values), stage=stage)
    gain = accuracy["ppo"] - accuracy["sft"]
    summary += rung_rows("gain", P.policy_rungs, mean_intervals(gain))
    both = (accuracy["sft"], accuracy["ppo"])
    headroom = nested_bootstrap(both, lambda m: (m[1] - m[0]) / (1 - m[0]), rng=new_rng(), on="means")
    summary += rung_rows("gain_per_headroom", P.policy_rungs, headroom)
    slope = nested_bootstrap(gain, lambda means: slope_per_doubling(sizes, means), rng=new_rng(), on="means")
    result = judge("C1", slope)
    summary.append(summary_row("gain_slope", slope) | {"verdict": result.verdict})
    summary += band_rows("gain_fit", "num_params", fit_with_intervals(fit_slope, sizes, gain, rng=new_rng()), slope)
    for rung in P.other_rungs:
        summary += _other_reward_model(P, folders, rung, accuracy["sft"], sizes, rows)
    extra = {"training.csv": training_metrics(P, folders)}
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), (result,), extra)


def _other_reward_model(
    P: PolicySize, folders: Folders, rung: str, before: np.ndarray, sizes: np.ndarray, rows: "Runs"
) -> list[dict[str, Any]]:
    """Summary rows of the gain and its slope with another fixed reward model; ``before`` [policy, seed, prompt]."""
    after = []
    for policy_rung in P.policy_rungs:
        for seed in P.other_seeds:
            spec = P.other(rung, policy_rung, seed)
            responses = read_responses(folders, spec)
            after.append(responses.exact.mean(1))
            about = {"rung": policy_rung, "stage": f"ppo by {rung}", "seed": seed}
            rows.add(spec, {"sampled_exact": responses.exact.mean()}, num_prompts=responses.num_prompts, **about)
    before = before[:, [P.seeds.index(seed) for seed in P.other_seeds]]
    gain = np.array(after).reshape(before.shape) - before
    slope = nested_bootstrap(gain, lambda means: slope_per_doubling(sizes, means), rng=new_rng(), on="means")
    about = {"reward_model": rung, "reward_model_params": num_params(rung)}
    found = rung_rows("other_gain", P.policy_rungs, mean_intervals(gain), **about)
    return [*found, summary_row("other_gain_slope", slope, **about)]


def best_of_n(P: BestOfN, folders: Folders) -> Tables:
    """C6: best-of-N by reward-model rung and seed, votes, pass@N, and how the gain for each doubling changes."""
    sizes, responses = list(P.best_of), read_responses(folders, P.samples)
    rows, prompts = Runs(P), []
    proxy = np.array(
        [[read_scores(folders, P.scores(rung, seed)) for seed in P.seeds] for rung in P.reward_model_rungs]
    )  # [reward model, seed, prompt, sample]
    curves = {
        "best_of_n": bon.best_of_n(np.broadcast_to(responses.exact, proxy.shape), proxy, sizes),
        "best_of_n_gold": _standardised_gold(responses.gold, proxy, sizes),
        "best_of_n_proxy": _standardised_proxy(proxy, sizes),
    }  # each [reward model, seed, prompt, size]
    for r, rung in enumerate(P.reward_model_rungs):
        for s, seed in enumerate(P.seeds):
            spec = P.scores(rung, seed)
            for n, size in enumerate(sizes):
                metrics = {name: curve[r, s, :, n].mean() for name, curve in curves.items()}
                about = {"seed": seed, "num_prompts": responses.num_prompts, "num_responses": size}
                rows.add(spec, metrics, rung=P.policy_rung, reward_model=rung, **about)
                if size in P.claim_sizes:
                    value = curves["best_of_n"][r, s, :, n]
                    per_prompt = per_prompt_table(spec, seed, "best_of_n", value)
                    prompts.append(per_prompt.assign(num_responses=size, reward_model=rung))
    summary = []
    for name, curve in curves.items():
        means = mean_intervals(np.moveaxis(curve, -1, 1).reshape(-1, *curve.shape[1:3]))
        cells = [(rung, size) for rung in P.reward_model_rungs for size in sizes]
        for (rung, size), interval in zip(cells, means.split(), strict=True):
            params = num_params(rung)
            about = {"reward_model": rung, "reward_model_params": params, "num_responses": size}
            summary.append(summary_row(name, interval, **about))
    for name, values in _votes(responses, read_final_answers(folders, P.samples), sizes).items():
        interval = bootstrap(values.T, lambda means: means, unit="prompt", rng=new_rng(), on="means")
        for size, part in zip(sizes, interval.split(), strict=True):
            summary.append(summary_row(name, part, num_responses=size))
    reference = np.moveaxis(curves["best_of_n"][P.reward_model_rungs.index(P.reference_rung)], -1, 0)
    difference = nested_bootstrap(reference, lambda m: _early_minus_late(P, m), rng=new_rng(), on="means")
    result = judge("C6", difference)
    ranges = dict(zip(("first", "early", "late", "last"), P.claim_sizes, strict=True))
    row = summary_row("early_minus_late_gain", difference, reward_model=P.reference_rung, **ranges)
    summary.append(row | {"verdict": result.verdict})
    most = sizes.index(max(sizes))
    in_all = nested_bootstrap(reference, lambda m: m[most] - m[sizes.index(1)], rng=new_rng(), on="means")
    summary.append(summary_row("gain_at_largest_n", in_all, reward_model=P.reference_rung, num_responses=max(sizes)))
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), (result,))


def _early_minus_late(P: BestOfN, means: np.ndarray) -> float:
    """Mean gain for each doubling of N over the early range of the claim minus that over its late range."""
    first, early, late, last = (means[P.best_of.index(size)] for size in P.claim_sizes)
    sizes = P.claim_sizes
    return (early - first) / np.log2(sizes[1] / sizes[0]) - (last - late) / np.log2(sizes[3] / sizes[2])


def _standardised_gold(gold: np.ndarray, proxy: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Gold of the chosen response above that of one response to the same prompt, in s.d. of single responses."""
    curve = bon.best_of_n(np.broadcast_to(gold / gold.std(), proxy.shape), proxy, sizes)
    return curve - curve[..., [sizes.index(1)]]


def _standardised_proxy(proxy: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Proxy of the chosen response above that of one response, in s.d. of each reward model's single scores."""
    curve = bon.expected_proxy(proxy / proxy.std(axis=(2, 3), keepdims=True), sizes)
    return curve - curve[..., [sizes.index(1)]]


def _votes(responses: "Responses | Answers", answers: np.ndarray, sizes: list[int]) -> dict[str, np.ndarray]:
    """pass@N and majority vote, float64 [prompt, size]. Unfinished responses have no answer: each is its own."""
    missing = answers < 0
    answers = np.where(missing, -1 - np.arange(answers.shape[1]), answers)
    vote = bon.majority_vote(answers, responses.exact, sizes, rng=new_rng())
    return {"pass_at_n": bon.pass_at_n(responses.exact, sizes), "majority_vote": vote}


def test_bed(P: TestBed, folders: Folders) -> Tables:
    """Loss against compute, accuracy by rung and family, reward models by size and data, and the bed's conditions."""
    rows, summary, prompts = Runs(P), [], []
    excess = _ladder_loss(P, folders, rows, prompts)
    sizes = {rung: num_params(rung) for rung in P.policy_rungs}
    flops = np.array([_last_loss(folders, P, rung)["flops"] for rung in P.policy_rungs])
    interval = bootstrap(excess, lambda means: means, unit="prompt", rng=new_rng(), on="means")
    for rung, compute, part in zip(P.policy_rungs, flops, interval.split(), strict=True):
        about = {"rung": rung, "num_params": sizes[rung], "train_flops": compute}
        summary.append(summary_row("excess_loss", part, **about))
    fit = fit_with_intervals(fit_power_law, flops, excess, unit="prompt", rng=new_rng())
    exponent = fit.intervals["b"]
    summary += band_rows("loss_fit", "train_flops", fit, exponent)
    summary.append(summary_row("loss_exponent", exponent))
    summary.append(summary_row("loss_r2", exponent) | {"estimate": fit.r2_log, "ci_low": np.nan, "ci_high": np.nan})
    accuracy = _ladder_accuracy(P, folders, rows, summary, prompts)
    pairs = _reward_model_accuracy(P, folders, rows, summary, prompts)
    best = _best_of_eight(P, folders)
    gains = policy_size(P.gains(), folders)
    gain_rows = gains.summary[gains.summary["quantity"] == "gain"]
    conditions = _conditions(P, fit.r2_log, accuracy, pairs, best, gain_rows)
    summary += [summary_row("best_of_8_minus_mean", best, rung=P.data_rung)]
    summary += gain_rows.dropna(axis=1).to_dict("records")
    return Tables(rows.table(), pd.DataFrame(summary), pd.concat(prompts), extra={"conditions.csv": conditions})


def _ladder_loss(P: TestBed, folders: Folders, rows: "Runs", prompts: list) -> np.ndarray:
    """Loss above the demonstrators' own: float64 [rung, document], whose mean is in nats for each response token."""
    excess = []
    demonstrators = demonstration_nats(held_out_documents(P.settings.pretrain_slip), P.settings.pretrain_slip)
    for rung in P.policy_rungs:
        spec = P.settings.pretrain(rung)
        final = load_file(folders[spec] / "held_out.safetensors")
        values = (final["nats"] - demonstrators) / final["tokens"].mean()
        last = _last_loss(folders, P, rung)
        metrics = {"excess_loss": values.mean(), "heldout_loss": last["loss_nats"]}
        rows.add(spec, metrics, rung=rung, train_flops=last["flops"], seed=spec.seed, num_prompts=len(values))
        prompts.append(per_prompt_table(spec, spec.seed, "excess_loss", values))
        excess.append(values)
    return np.array(excess)


def _ladder_accuracy(P: TestBed, folders: Folders, rows: "Runs", summary: list, prompts: list) -> np.ndarray:
    """Sampled exact accuracy of the SFT rungs: float64 [rung, prompt]. Adds rows by family and by difficulty."""
    sampled_exact = []
    families = list(tasks.FAMILIES)
    for rung in P.policy_rungs:
        sft, params = P.settings.sft(rung), num_params(rung)
        for metric, seed, greedy in (("sampled_exact", P.seeds[0], False), ("greedy_exact", 0, True)):
            spec = P.settings.evaluation(sft, seed, greedy=greedy)
            responses = read_responses(folders, spec)
            exact = responses.exact.mean(1)
            groups = {("family", name): responses.family == index for index, name in enumerate(families)}
            groups |= {("difficulty", k): responses.difficulty == k for k in np.unique(responses.difficulty).tolist()}
            for (kind, name), chosen in groups.items():
                about = {"rung": rung, kind: name}
                rows.add(spec, {metric: exact[chosen].mean()}, seed=seed, num_prompts=int(chosen.sum()), **about)
                if kind == "family":
                    interval = bootstrap(exact[chosen], np.mean, unit="prompt", rng=new_rng(), on="means")
                    summary.append(summary_row(metric, interval, num_params=params, **about))
            if not greedy:
                sampled_exact.append(exact)
                prompts.append(per_prompt_table(spec, seed, metric, exact))
    return np.array(sampled_exact)


def _reward_model_accuracy(
    P: TestBed, folders: Folders, rows: "Runs", summary: list, prompts: list
) -> dict[tuple[str, int], Interval]:
    """Interval of the accuracy within a prompt, by rung and number of labelled prompts.

    A prompt counts where its responses have unequal gold; that depends on the responses alone, not on the model.
    """
    specs = P.reward_models()
    held_out = {cell: load_file(folders[spec] / "held_out.safetensors") for cell, spec in specs.items()}
    # the label rungs answer the same prompts, so a prompt's accuracy is the mean over those that give it a pair
    accuracy = {cell: mean_where_known(found["pair_accuracy"]) for cell, found in held_out.items()}
    counts = ~np.isnan(next(iter(accuracy.values())))
    num_pairs: dict[tuple[str, int], int] = {}
    for (rung, labelled, seed), spec in specs.items():
        values = accuracy[rung, labelled, seed][counts]
        # seeds label prompts of their own, so their numbers of pairs differ a little: name a cell by the first seed's
        pairs = num_pairs.setdefault((rung, labelled), int(held_out[rung, labelled, seed]["num_pairs"]))
        about = {"num_pairs": pairs, "labelled_prompts": labelled, "seed": seed, "num_prompts": len(values)}
        rows.add(spec, {"pairwise_accuracy": values.mean()}, rung=rung, **about)
        per_prompt = per_prompt_table(spec, seed, "pairwise_accuracy", values)
        prompts.append(per_prompt.assign(prompt_id=np.flatnonzero(counts)))
    intervals = {}
    for (rung, labelled), pairs in num_pairs.items():
        values = np.array([accuracy[rung, labelled, seed][counts] for seed in P.seeds])
        interval = intervals[rung, labelled] = nested_bootstrap(values, np.mean, rng=new_rng(), on="means")
        about = {"rung": rung, "num_params": num_params(rung), "num_pairs": pairs}
        summary.append(summary_row("pairwise_accuracy", interval, **about))
    return intervals


def mean_where_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of [label rung, prompt], leaving NaN out; NaN where no entry is known."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _best_of_eight(P: TestBed, folders: Folders) -> Interval:
    """Exact accuracy of best-of-8 by the data rung's reward model minus that of one response."""
    values = []
    for seed in P.seeds:
        samples, scores = P.best_of_eight(seed)
        exact, proxy = read_responses(folders, samples).exact, read_scores(folders, scores)
        best, mean = bon.best_of_n(exact, proxy, [8])[:, 0], exact.mean(1)
        values.append(best - mean)
    return nested_bootstrap(np.array(values), np.mean, rng=new_rng(), on="means")


def _conditions(
    P: TestBed,
    r2: float,
    accuracy: np.ndarray,
    pairs: Mapping[tuple[str, int], Interval],
    best: Interval,
    gains: pd.DataFrame,
) -> pd.DataFrame:
    """What the bed must show before figures are drawn from it: condition, measured, threshold, met."""
    means = accuracy.mean(1)
    steps, full = np.diff(means), P.settings.reward_prompts
    by_size = [pairs[rung, full].estimate for rung in P.reward_model_rungs]
    by_data = [pairs[P.data_rung, count].estimate for count in (*sorted(P.data_prompts), full)]
    positive = int((gains["ci_low"] > 0).sum())
    joined = " -> ".join
    shown = [joined(f"{value:.2f}" for value in values) for values in (means, by_size, by_data)]
    checks = [
        (
            "loss above the demonstrators' own against compute: R2 of the power law",
            f"{r2:.3f}",
            ">= 0.95",
            r2 >= 0.95,
        ),
        ("rungs in that fit", str(len(means)), ">= 5", len(means) >= 5),
        ("sampled exact accuracy rises along the ladder", shown[0], "every step > 0", (steps > 0).all()),
        ("its rise in all", f"{means[-1] - means[0]:.3f}", ">= 0.3", means[-1] - means[0] >= 0.3),
        ("its maximum", f"{means.max():.3f}", "< 0.9", means.max() < 0.9),
        ("pair accuracy within a prompt by size", shown[1], "largest > smallest", by_size[-1] > by_size[0]),
        ("the same by data", shown[2], "every step > 0", (np.diff(by_data) > 0).all()),
        ("the same with the fewest labels is near chance", f"{by_data[0]:.3f}", "<= 0.6", by_data[0] <= 0.6),
        ("the same at its best", f"{max(by_size):.3f}", ">= 0.8", max(by_size) >= 0.8),
        (
            f"best-of-8 by the {P.data_rung} reward model minus the mean",
            f"{best.estimate:.3f} [{best.low:.3f}, {best.high:.3f}]",
            "interval > 0",
            best.low > 0,
        ),
        ("rungs whose gain from PPO has an interval above 0", str(positive), ">= 3", positive >= 3),
        ("seeds of every reward model and policy", str(len(P.seeds)), ">= 5", len(P.seeds) >= 5),
    ]
    return pd.DataFrame(checks, columns=["condition", "measured", "threshold", "met"])


def training_metrics(P: PolicySize, folders: Folders) -> pd.DataFrame:
    """Every update of every policy, as `plots.training_curves` wants it."""
    tables = []
    for rung in P.policy_rungs:
        for seed in P.seeds:
            table = read_metrics(folders, P.policy(rung, seed))
            about = {"rung": rung, "num_params": num_params(rung), "seed": seed}
            tables.append(
                table.rename(columns={"response_tokens": "response_length", "finished": "eos_share"}).assign(**about)
            )
    return pd.concat(tables, ignore_index=True)


def walkthrough(P: Walkthrough, folders: Folders, metrics: pd.DataFrame, after: Responses) -> Tables:
    """The live run's metrics update by update, and accuracy on held-out prompts before and after it.

    Args:
        metrics: what the trainer returned, with ``gold`` and ``exact``.
        after: the trained policy's responses to the prompts of ``P.before``.
    """
    live = f"live-{P.hash}"  # no artifact: the run is made anew each time
    about = {"figure": P.figure, "command": command(P), "rung": P.rung, "num_params": num_params(P.rung)}
    runs = [metrics.melt("update", var_name="metric").assign(node=live, num_prompts=P.prompts_per_update)]
    summary, prompts, exact = [], [], {}
    for stage, node, responses in (("sft", P.before.key, read_responses(folders, P.before)), ("ppo", live, after)):
        exact[stage] = responses.exact.mean(1)
        row = {"metric": "sampled_exact", "value": exact[stage].mean(), "node": node, "stage": stage}
        runs.append(pd.DataFrame([row | {"num_prompts": responses.num_prompts}]))
        per_prompt = {"node": node, "seed": P.seed, "metric": "sampled_exact", "value": exact[stage], "stage": stage}
        prompts.append(pd.DataFrame(per_prompt).rename_axis("prompt_id").reset_index())
        interval = bootstrap(exact[stage], np.mean, unit="prompt", rng=new_rng(), on="means")
        summary.append(summary_row("sampled_exact", interval, stage=stage))
    gain = bootstrap(exact["ppo"] - exact["sft"], np.mean, unit="prompt", rng=new_rng(), on="means")
    summary.append(summary_row("gain", gain))
    table = pd.concat(runs, ignore_index=True).assign(seed=P.seed, **about)
    return Tables(table, pd.DataFrame(summary), pd.concat(prompts))


def benchmarks(P: Benchmarks, folders: Folders) -> Tables:
    """Planted judgments through the length-controlled metric, with the coverage of its intervals; and MT-Bench.

    The further table mt_bench.csv holds MT-Bench's estimates. Where they cannot be made here, those of the same
    parameters that stand in the results folder are kept: `mt_bench_note` says so.
    """
    node, about = f"planted-{P.hash}", {"figure": P.figure, "command": command(P), "seed": P.seed}
    runs, summary, prompts = [], [], []
    for place, (win_rate, extra) in enumerate(zip(P.win_rates, P.extra_chars, strict=True)):
        model, rng = f"planted {place + 1}", np.random.default_rng((P.seed, place))
        drawn = planted.annotations(rng, win_rate=win_rate, extra_chars=extra, num_instructions=P.num_instructions)
        gamed = planted.gamed(rng, num_instructions=P.num_instructions)
        shown = {"model": model, "planted": win_rate}
        intervals = {
            "win_rate": alpaca_eval.win_rate_interval(drawn, rng=new_rng()),
            "length_controlled": alpaca_eval.lc_interval(
                drawn, gamed, C=planted.C, rng=new_rng(), num_draws=P.num_refits
            ),
            "extra_chars": bootstrap(
                drawn.len_model - drawn.len_baseline, np.mean, unit="prompt", rng=new_rng(), on="means"
            ),
        }
        summary += [summary_row(name, interval, **shown) for name, interval in intervals.items()]
        cell = about | shown | {"node": node, "rung": "", "num_params": 0, "num_prompts": P.num_instructions}
        runs += [cell | {"metric": name, "value": interval.estimate} for name, interval in intervals.items()]
        per_prompt = {"node": node, "seed": P.seed, "metric": "win", "value": drawn.wins, "model": model}
        prompts.append(pd.DataFrame(per_prompt).rename_axis("prompt_id").reset_index())
    shares = json.loads((folders[P.coverage] / "coverage.json").read_text())
    hardest = f"planted {P.hardest + 1}"
    for name, share in shares.items():
        low, high = proportion_interval(share, P.num_simulations)
        summary.append(
            {"quantity": "coverage", "model": hardest, "interval": name, "estimate": share}
            | {"ci_low": low, "ci_high": high, "ci_method": "simulations, Wilson", "num_seeds": P.num_simulations}
            | {"num_prompts": P.num_instructions}
        )
    extra = {}
    mt_bench = _kept_mt_bench(P) if P.missing else _mt_bench(P, folders)
    if mt_bench is not None:
        extra["mt_bench.csv"] = mt_bench
    return Tables(pd.DataFrame(runs), pd.DataFrame(summary), pd.concat(prompts), extra=extra)


def proportion_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's (1927) 95% interval of a share of ``count`` independent trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return float(middle - half), float(middle + half)


def _mt_bench(P: Benchmarks, folders: Folders) -> pd.DataFrame:
    from rlhfscale.evals import benchmarks as evals  # it imports torch

    folder = folders[P.mt_bench]
    about = {"judge": P.judge, "constrained": P.constrained}
    pairs = pd.read_csv(folder / "pairs.csv").replace({"winner": {np.nan: None}})
    tables = [evals.mt_pair_summary(pairs, new_rng(), stage="after against before", **about)]
    if (folder / "scores.csv").is_file():
        for stage, rows in pd.read_csv(folder / "scores.csv").groupby("stage"):
            tables.append(evals.mt_summary(rows, new_rng(), stage=stage, **about))
    return pd.concat(tables, ignore_index=True).assign(params_hash=P.hash)


def _kept_mt_bench(P: Benchmarks) -> pd.DataFrame | None:
    """MT-Bench's estimates of an earlier run with the same parameters, from the results folder."""
    path = ResultsFolder(P.figure, tier=tier(P)).path / "mt_bench.csv"
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    return table if (table["params_hash"] == P.hash).all() else None


def mt_bench_note(P: Benchmarks, tables: Tables) -> str:
    """In a sentence, whether MT-Bench was run here, and what it would take."""
    if not P.missing:
        return f"MT-Bench: {P.num_questions} questions, {P.after} against {P.before}, judged by {P.judge}."
    found = "the table below is an earlier run's" if "mt_bench.csv" in tables.extra else "no table of it is shown"
    return f"MT-Bench was not run here ({'; '.join(P.missing)}); {found}."


class Runs:
    """Collects the rows of runs.csv."""

    def __init__(self, P: StudyFigure):
        self._common = {"figure": P.figure, "command": command(P)}
        self._rows: list[dict[str, Any]] = []

    def add(self, spec: Spec, metrics: Mapping[str, float], *, rung: str, **about: Any) -> None:
        about = {"node": spec.key, "rung": rung, "num_params": num_params(rung), **about}
        self._rows += [self._common | about | {"metric": name, "value": float(v)} for name, v in metrics.items()]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self._rows)


def per_prompt_table(spec: Spec, seed: int, metric: str, values: np.ndarray) -> pd.DataFrame:
    columns = {"node": spec.key, "seed": seed, "prompt_id": np.arange(len(values)), "metric": metric, "value": values}
    return pd.DataFrame(columns)


def rung_rows(quantity: str, rungs: Sequence[str], interval: Interval, **about: Any) -> list[dict[str, Any]]:
    return [
        summary_row(quantity, part, rung=rung, num_params=num_params(rung), **about)
        for rung, part in zip(rungs, interval.split(), strict=True)
    ]


def band_rows(quantity: str, x: str, fit: Any, like: Interval) -> list[dict[str, Any]]:
    """The fitted curve with its band, on the fit's grid."""
    rows = []
    for place, estimate, low, high in zip(*(fit.band[name] for name in ("x", "estimate", "low", "high")), strict=True):
        rows.append(summary_row(quantity, like, **{x: place}) | {"estimate": estimate, "ci_low": low, "ci_high": high})
    return rows


def mean_intervals(values: np.ndarray) -> Interval:
    """The mean of each entry of the first axis, with intervals; values are [entry, seed, prompt]."""
    return nested_bootstrap(values, lambda means: means, rng=new_rng(), on="means")


def new_rng() -> np.random.Generator:
    return np.random.default_rng(BOOTSTRAP_SEED)


def read_responses(folders: Folders, spec: roles.Samples) -> "Responses | Answers":
    """Graded responses: of both kinds are ``exact``, ``gold``, ``finished`` and ``response_lengths`` [prompt, sample].

    Those of language models need transformers, and are only imported where there are some.
    """
    if isinstance(spec, chat_specs.Answers):
        from rlhfscale.chat.answers import Answers

        return Answers.load(folders[spec])
    return Responses.load(folders[spec] / "responses.safetensors")


def read_final_answers(folders: Folders, spec: roles.Samples) -> np.ndarray:
    """int64 [prompt, sample]: equal numbers for equal final answers to a prompt; -1 for a response without one."""
    responses = read_responses(folders, spec)
    if isinstance(spec, chat_specs.Answers):
        from transformers import AutoTokenizer

        model = folders[spec.model.saved] / "model"
        return responses.answers(AutoTokenizer.from_pretrained(model, local_files_only=True))
    return responses.answers()


def read_metrics(folders: Folders, policy: roles.Policy) -> pd.DataFrame:
    """A policy's updates. A language model's answer is right or wrong: that is both its ``exact`` and its ``gold``."""
    table = pd.read_csv(folders[policy] / "metrics.csv")
    return table.assign(exact=table["right"], gold=table["right"]) if isinstance(policy, chat_specs.Aligned) else table


def read_scores(folders: Folders, spec: Spec) -> np.ndarray:
    return load_file(folders[spec] / "scores.safetensors")["scores"]


def _last_loss(folders: Folders, P: TestBed, rung: str) -> dict[str, float]:
    return pd.read_csv(folders[P.settings.pretrain(rung)] / "loss.csv").iloc[-1].to_dict()
