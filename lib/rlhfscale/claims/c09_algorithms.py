"""Does the RL algorithm matter? (claim C9)

PPO, GRPO and RLOO are run at equal roll-outs and at equal time. The claim is a test of equivalence: the difference
between GRPO and PPO must lie within a margin, and PPO must have a gain larger than the margin at all.
"""

from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from pydantic import model_validator

from rlhfscale.runs.policy_spec import Algorithm
from rlhfscale.stats.bootstrap import nested_bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, read_metrics
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, about_policy, cost, new_rng

EQUIVALENCE_MARGIN = 0.01
"""Difference in exact accuracy within which two algorithms count as equal: about a quarter of what PPO gains at the
rung of the comparison (0.044 at 55k)."""


class Params(OnePolicy):
    """C9: PPO, GRPO and RLOO at equal roll-outs, by responses per prompt."""

    figure: ClassVar[str] = "09_algorithms"
    title: ClassVar[str] = "The RL algorithm matters little"
    claims: ClassVar[tuple[str, ...]] = ("C9",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    algorithms: tuple[Algorithm, ...] = field(role="scientific", min_length=2, doc="ppo and grpo, and further ones")
    rollouts: int = field(role="fixed", ge=2, doc="roll-outs in an update")
    responses: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="responses per prompt, each at least 2; prompts are rollouts / responses"
    )
    equal_time_responses: int = field(role="fixed", ge=2, doc="responses per prompt where time is held equal")
    equal_time_updates: tuple[int, ...] = field(
        role="fixed", doc="updates of each of the algorithms that take as long as each other"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        if len(set(self.algorithms)) < len(self.algorithms) or not {"ppo", "grpo"} <= {*self.algorithms}:
            raise ValueError(f"algorithms: {list(self.algorithms)} must hold ppo and grpo, and none twice")
        if len(set(self.responses)) < len(self.responses) or min(self.responses) < 2:
            raise ValueError(f"responses: {list(self.responses)} must be different and at least 2")
        for size in self.responses:
            if self.rollouts % size:
                raise ValueError(f"responses: {size} does not divide the {self.rollouts} roll-outs")
        self._splits("rollouts", self.rollouts, 1)
        if self.rollouts % self.equal_time_responses:
            raise ValueError(f"equal_time_responses: {self.equal_time_responses} does not divide {self.rollouts}")
        if len(self.equal_time_updates) != len(self.algorithms) or min(self.equal_time_updates) < 1:
            raise ValueError(
                f"equal_time_updates: {list(self.equal_time_updates)} is not one number for each algorithm"
            )
        return self

    def policy(self, algorithm: Algorithm, responses: int, seed: int) -> roles.Policy:
        about = {"algorithm": algorithm, "prompts": self.rollouts // responses, "responses": responses}
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed, **about)

    def in_equal_time(self, algorithm: Algorithm, seed: int) -> roles.Policy:
        """The policy that had as long as those of the other algorithms."""
        updates = self.equal_time_updates[self.algorithms.index(algorithm)]
        return self.policy(algorithm, self.equal_time_responses, seed).changed(num_updates=updates)

    def equal_rollouts(self) -> tuple[roles.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.algorithms, self.responses, self.seeds))

    def policies(self) -> tuple[roles.Policy, ...]:
        timed = (self.in_equal_time(*cell) for cell in product(self.algorithms, self.seeds))
        return tuple(dict.fromkeys([*self.equal_rollouts(), *timed]))


CLAIM = register(
    Claim(
        id="C9",
        statement="The RL algorithm (PPO or GRPO) matters little",
        paper="",
        statistic=(
            "sampled exact accuracy after GRPO minus that after PPO, at equal roll-outs, mean over the numbers of "
            f"responses per prompt; equivalence: two one-sided tests, margin {EQUIVALENCE_MARGIN}; premise: PPO's "
            "own gain exceeds the margin"
        ),
        rule=Rule(
            (
                Part("GRPO minus PPO", "below", EQUIVALENCE_MARGIN),
                Part("GRPO minus PPO", "above", -EQUIVALENCE_MARGIN),
                Part("PPO gain", "above", EQUIVALENCE_MARGIN, premise=True),
            )
        ),
    )
)


def measure(P: Params, folders: Folders) -> Tables:
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
            result = CLAIM.judge(dict(zip(CLAIM.rule.intervals, (whole, gain), strict=True)))
            row |= {"verdict": result.verdict}
        found.summary.append(row)
    timed = {}
    for name in P.algorithms:
        timed[name] = _in_equal_time(P, found, name, accuracy[name])
        if name != "ppo":
            difference = nested_bootstrap(timed[name] - timed["ppo"], np.mean, rng=new_rng(), on="means")
            row = summary_row("minus_ppo_in_equal_time", difference, algorithm=name)
            found.summary.append(row | {"responses_per_prompt": P.equal_time_responses})
    extra = {"training.csv": training(P, folders), "cost.csv": cost(P, folders)}
    return found.tables(result, extra=extra)


def _in_equal_time(P: Params, found: "Collector", name: str, equal_rollouts: np.ndarray) -> np.ndarray:
    """Accuracy [seed, prompt] of the policies that had as long as the other algorithms'; adds their rows, unless they
    are among those of equal roll-outs [responses, seed, prompt]."""
    policies = [P.in_equal_time(name, seed) for seed in P.seeds]
    if policies[0] in P.equal_rollouts():
        return equal_rollouts[P.responses.index(P.equal_time_responses)]
    return found.after(policies, algorithm=name, num_updates=policies[0].num_updates)


def training(P: Params, folders: Folders) -> pd.DataFrame:
    """Every update of every policy, as `plots_sweeps.learning_curves` wants it."""
    columns = ["update", "proxy", "gold", "exact", "kl_nats", "response_tokens", "finished"]
    return pd.concat(
        [read_metrics(folders, p)[columns].assign(**about_policy(p)) for p in P.equal_rollouts()],
        ignore_index=True,
    )


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """C9: gain by algorithm at equal roll-outs, and the distance from PPO within the margin of equivalence.

    Args:
        runs: ``algorithm``, ``responses_per_prompt``, ``stage``, ``seed``, ``metric``, ``value``; the metric
            ``sampled_exact`` is drawn.
        summary: the common columns, ``algorithm``, ``responses_per_prompt``, ``margin``, ``verdict``; quantities
            ``gain`` and ``minus_ppo`` (by algorithm and size), ``minus_ppo_in_all`` (by algorithm; GRPO's has the
            verdict).
    """
    whole = style.select(summary, "minus_ppo_in_all")
    grpo = whole[whole["algorithm"] == "grpo"].iloc[0]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars: ')} Shaded: differences that count as none "
        f"(margin {grpo.margin:g}). GRPO minus PPO in all: {style.signed_interval(grpo)}. C9: {grpo.verdict}."
    )
    figure, (left, right), legend = style.new_figure(1, 2, 2.9, caption)
    sampled = runs[runs["metric"] == "sampled_exact"]
    start = sampled[sampled["stage"] == "sft"].set_index("seed")["value"]
    sizes = sorted({int(size) for size in sampled["responses_per_prompt"].dropna()})
    names = [name for name in style.ALGORITHMS if name in set(sampled["algorithm"])]
    right.axhspan(-grpo.margin, grpo.margin, color="0.9", linewidth=0)
    for axis in (left, right):
        axis.axhline(0, color="0.4", linewidth=0.8)
    handles = []
    for index, name in enumerate(names):
        label, color, marker = style.ALGORITHMS[name]
        look = {"color": color, "marker": marker, "linestyle": "none"}
        handles.append(Line2D([], [], label=label, **look))
        place = {size: spot + 0.22 * (index - (len(names) - 1) / 2) for spot, size in enumerate(sizes)}
        dots = sampled[sampled["algorithm"] == name]
        dots = dots.assign(value=dots["value"] - dots["seed"].map(start), place=dots["responses_per_prompt"].map(place))
        style.draw_dots(left, dots, "place", color)
        rows = style.select(summary, "gain", algorithm=name)
        style.draw_estimates(left, rows.assign(place=rows["responses_per_prompt"].map(place)), "place", **look)
        if name != "ppo":
            rows = style.select(summary, "minus_ppo", algorithm=name)
            style.draw_estimates(right, rows.assign(place=rows["responses_per_prompt"].map(place)), "place", **look)
            spot = len(sizes) + 0.22 * (index - (len(names) - 1) / 2)
            style.draw_estimates(right, whole[whole["algorithm"] == name].assign(place=spot), "place", **look)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    right.set_xticks(range(len(sizes) + 1), [*map(str, sizes), "mean"])
    left.set(title="gain at equal roll-outs", xlabel="responses per prompt", ylabel="accuracy, trained minus SFT")
    right.set(title="distance from PPO", xlabel="responses per prompt", ylabel="accuracy, minus PPO")
    legend(handles, ncols=3)
    return figure


@style.styled
def draw_training(metrics: pd.DataFrame) -> Figure:
    """Gold reward and KL update by update, a column for each number of responses per prompt, every seed drawn.

    Args:
        metrics: one row per run and update: ``algorithm``, ``responses_per_prompt``, ``seed``, ``update``, ``gold``
            (mean of the update's roll-outs) and ``kl_nats``.
    """
    sizes = sorted(metrics["responses_per_prompt"].unique())
    caption = (
        f"Roll-outs of training. Thin lines: {metrics['seed'].nunique()} seeds; thick lines: their mean, gold over "
        "five updates; no intervals."
    )
    figure, axes, legend = style.new_figure(2, len(sizes), 3.8, caption)
    axes = np.reshape(axes, (2, len(sizes)))
    names = [name for name in style.ALGORITHMS if name in set(metrics["algorithm"])]
    for column, size in enumerate(sizes):
        for row, (metric, window) in enumerate((("gold", 5), ("kl_nats", 1))):
            axis = axes[row, column]
            for name in names:
                chosen = metrics[(metrics["algorithm"] == name) & (metrics["responses_per_prompt"] == size)]
                table = chosen.pivot_table(index="update", columns="seed", values=metric)
                color = style.ALGORITHMS[name][1]
                axis.plot(table.index, table, color=color, linewidth=0.5, alpha=0.4)
                mean = table.mean(axis=1).rolling(window, min_periods=1, center=True).mean()
                axis.plot(table.index, mean, color=color, linewidth=1.6)
            axis.sharey(axes[row, 0])
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes[0, column].set(title=f"{size} responses")
        axes[1, column].set(xlabel="update")
    axes[0, 0].set(ylabel="gold reward")
    axes[1, 0].set(ylabel="KL to reference (nats)")
    legend(
        [Line2D([], [], color=style.ALGORITHMS[name][1], label=style.ALGORITHMS[name][0]) for name in names], ncols=3
    )
    return figure
