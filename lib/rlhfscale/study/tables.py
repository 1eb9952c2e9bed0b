"""From artifacts to tidy tables: what the figures share. Each module of `rlhfscale.claims` has its own ``measure``.

Accuracies are means over a prompt's samples first. Intervals then resample seeds and prompts, see `stats.bootstrap`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.study import roles
from rlhfscale.study.artifacts import Folders, last_updates, read_responses
from rlhfscale.study.figure import OnePolicy, RecipeFigure, StudyFigure
from rlhfscale.study.ledger import write_ledger
from rlhfscale.study.params import load
from rlhfscale.study.recipes import num_params
from rlhfscale.study.results import ResultsFolder
from rlhfscale.study.rules import CLAIMS, ClaimResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rlhfscale.runs.grid import Results

CUSTOM = "custom"
"""Results folder of parameters that are no tier's."""
NO_INTERVAL = {"ci_low": np.nan, "ci_high": np.nan}
"""Of an R2, which is bounded by 1: an interval that is symmetric about it would say nothing."""
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

    def verdicts(self) -> pd.DataFrame:
        """The claims' verdicts, for reading in a notebook."""
        rows = []
        for result in self.claims:
            claim = CLAIMS[result.claim_id]
            for name in claim.rule.intervals:
                found = result.intervals[name]
                interval = f"[{found.low:.4f}, {found.high:.4f}]"
                rule = {"all": " and ", "any": " or "}[claim.rule.combine].join(
                    part.describe() for part in claim.rule.parts if part.interval == name
                )
                rows.append([claim.id, claim.statement, f"{found.estimate:.4f}", interval, rule, result.verdict])
        return pd.DataFrame(
            rows, columns=["claim", "statement", "estimate", "95% interval", "reproduced if", "verdict"]
        )

    def mean_costs(self) -> pd.DataFrame:
        """Roll-outs and seconds that training took, see `cost`, mean over seeds."""
        by = ["algorithm", "prompts", "responses_per_prompt", "updates"]
        return self.extra["cost.csv"].groupby(by).mean().drop(columns="seed").round(1)

    def save(self, P: RecipeFigure, pictures: Mapping[str, "Figure"], made: "Results", wall_s: float) -> list[str]:
        """Write everything of a figure to results/<tier>/<figure>/, and return the names of the files there.

        Args:
            P: the figure's parameters; their recipe names the tier.
            pictures: matplotlib figures by file name without suffix.
            made: what `grid.ensure` returned for the figure's specs.
            wall_s: seconds that the notebook took, for the manifest.
        """
        folder = ResultsFolder(P.figure, tier=tier(P))
        folder.write_runs(self.runs)
        folder.write_summary(self.summary)
        folder.write_per_prompt(self.per_prompt)
        for name, table in self.extra.items():
            folder.write_table(name, table)
        for name, picture in pictures.items():
            folder.write_figure(picture, name)
        if self.claims:
            folder.write_claims(self.claims)
            write_ledger(folder.path.parent)
        roots = P.specs()
        ancestors = {spec.key for root in roots for spec in root.walk()}
        folder.write_manifest(
            P.resolved() | {"recipe_settings": P.settings.model_dump(mode="json")},
            made.store.manifests(ancestors) if roots else {},
            command=command(P),
            seeds=P.seeds,
            wall_s=wall_s,
        )
        return folder.files()


def command(P: RecipeFigure) -> str:
    """What makes a figure with these parameters."""
    if tier(P) == CUSTOM:
        return f"notebooks/{P.figure}.ipynb with the parameters in manifest.json"
    return f"make figures TIER={P.recipe} FIGURE={P.figure}"


def tier(P: RecipeFigure) -> str:
    """The tier whose file holds just these parameters, else CUSTOM: playing must not overwrite a tier's results."""
    return P.recipe if load(P.figure, P.recipe) == P else CUSTOM


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


def cost(P: OnePolicy, folders: Folders) -> pd.DataFrame:
    """Roll-outs and seconds that each policy's training took, on the machine and in the company it was run in."""
    rows = []
    for policy in P.policies():
        made = json.loads((folders[policy] / "manifest.json").read_text())
        rollouts = policy.num_updates * policy.prompts_per_update * policy.responses_per_prompt
        about = about_policy(policy) | {"updates": policy.num_updates, "rollouts": rollouts}
        rows.append(about | {"wall_s": made["wall_s"], "cpu_s": made["cpu_s"]})
    return pd.DataFrame(rows)


def about_policy(policy: roles.Policy) -> dict[str, Any]:
    return {
        "algorithm": policy.algorithm,
        "prompts": policy.prompts_per_update,
        "responses_per_prompt": policy.responses_per_prompt,
        "seed": policy.seed,
    }
