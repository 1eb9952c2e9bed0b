"""Which learning rates do the recipe's policies take, by rung and by algorithm?

The sweep uses seeds and prompts that no other figure uses, so that no verdict is measured on what the rates were
chosen on.
"""

from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pydantic import model_validator

from rlhfscale.runs.policy_spec import Algorithm
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, read_responses
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.tables import Runs, Tables, new_rng, per_prompt_table


class Params(StudyFigure):
    """Policies by learning rate, on seeds and prompts that no other figure uses: what the recipe's rates rest on."""

    figure: ClassVar[str] = "00_learning_rates"
    title: ClassVar[str] = "Learning rates by rung and by algorithm, chosen on seeds of their own"

    policy_rungs: tuple[str, ...] = field(role="nuisance", min_length=1, doc="rungs that PPO trains at every rate")
    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    rates: tuple[float, ...] = field(role="nuisance", min_length=2, doc="learning rates of the policy")
    siblings: tuple[Algorithm, ...] = field(role="nuisance", doc="algorithms beside PPO")
    siblings_rung: str = field(role="fixed", doc="the rung that they train")
    siblings_responses: int = field(role="fixed", ge=2, doc="their responses per prompt, at the recipe's roll-outs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("reward_model_rung", "siblings_rung"):
            self.settings.check_rungs(name, (getattr(self, name),))
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        if list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates: {list(self.rates)} must rise, from above 0")
        if self.common_rate not in self.rates:
            raise ValueError(f"rates: {list(self.rates)} lack the recipe's {self.common_rate}")
        return self

    @property
    def common_rate(self) -> float:
        """The recipe's rate of PPO for every rung, which the others are compared with."""
        return self.settings.ppo_policy_lr

    def cells(self) -> list[tuple[Algorithm, str]]:
        """Algorithm and rung of each sweep."""
        return [*(("ppo", rung) for rung in self.policy_rungs), *((name, self.siblings_rung) for name in self.siblings)]

    def policy(self, algorithm: Algorithm, rung: str, rate: float, seed: int) -> roles.Policy:
        about = {}
        if algorithm != "ppo":
            rollouts = self.settings.ppo_prompts * self.settings.ppo_responses
            about = {"prompts": rollouts // self.siblings_responses, "responses": self.siblings_responses}
        policy = self.settings.policy(rung, self.reward_model_rung, seed, algorithm=algorithm, **about)
        return policy.changed(policy_lr=rate)

    def evaluation(self, policy: roles.Policy) -> roles.Samples:
        """Responses to the prompts on which the recipe was chosen, which no verdict is measured on."""
        return self.settings.evaluation(policy, policy.seed).changed(prompt_seed=0)

    def specs(self) -> tuple[Spec, ...]:
        cells = product(self.cells(), self.rates, self.seeds)
        policies = [self.policy(*cell, rate, seed) for cell, rate, seed in cells]
        return (*policies, *map(self.evaluation, policies))


def measure(P: Params, folders: Folders) -> Tables:
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


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Accuracy above that at the common rate, against the rate: PPO by rung, and its siblings.

    Args:
        runs: not drawn.
        summary: the common columns, ``algorithm``, ``rung``, ``num_params``, ``policy_lr``; quantity ``minus_common``.
    """
    rows = style.select(summary, "minus_common")
    caption = (
        f"Sampled exact accuracy minus that at the common rate; bars: 95% intervals ({rows['ci_method'].iloc[0]}) "
        f"over {rows['num_prompts'].max():,} prompts, mean of the seeds. No other figure uses these seeds or prompts."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 2.8, caption)
    ppo = rows[rows["algorithm"] == "ppo"]
    colors = style.size_colors(dict(zip(ppo["rung"], ppo["num_params"], strict=True)))
    handles = []
    for index, (rung, color) in enumerate(colors.items()):
        of = ppo[ppo["rung"] == rung]
        beside = of["policy_lr"] * 2 ** (0.1 * (index - (len(colors) - 1) / 2))
        style.draw_estimates(left, of.assign(place=beside), "place", color=color, marker="o")
        handles.append(Line2D([], [], color=color, marker="o", label=f"PPO, {rung}"))
    others = rows[(rows["algorithm"] != "ppo") | (rows["rung"].isin(rows.loc[rows["algorithm"] != "ppo", "rung"]))]
    for index, (name, of) in enumerate(others.groupby("algorithm")):
        label, color, marker = style.ALGORITHMS[name]
        style.draw_estimates(
            right, of.assign(place=of["policy_lr"] * 2 ** (0.1 * index)), "place", color=color, marker=marker
        )
        handles.append(Line2D([], [], color=color, marker=marker, label=f"{label}, {of['rung'].iloc[0]}"))
    for axis in (left, right):
        axis.axhline(0, color="0.4", linewidth=0.8)
        rates = sorted(rows["policy_lr"].unique())
        style.doubling_axis(axis, rates, [f"{rate:g}" for rate in rates])
        axis.set(xlabel="learning rate")
    left.set(title="PPO by rung", ylabel="accuracy, minus the common rate")
    right.set(title="algorithms")
    legend(handles, ncols=5)
    return figure
