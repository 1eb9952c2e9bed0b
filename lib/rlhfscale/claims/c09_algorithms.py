"""Does the RL algorithm matter? (claim C9)

PPO, GRPO and RLOO train the same policy, once with equal numbers of roll-outs and once for equal time. The claim is a
test of equivalence: the difference between GRPO and PPO must lie within a margin, and PPO's own gain must exceed it.
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
from rlhfscale.stats.bootstrap import Interval, nested_bootstrap, summary_row
from rlhfscale.study import roles, style
from rlhfscale.study.artifacts import Folders, read_metrics
from rlhfscale.study.figure import OnePolicy
from rlhfscale.study.params import field
from rlhfscale.study.rules import Claim, Part, Rule, register
from rlhfscale.study.tables import Collector, Tables, about_policy, cost, new_rng


class Params(OnePolicy):
    """PPO, GRPO and RLOO with equal roll-outs, for several numbers of responses per prompt."""

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
        self._splits("rollouts", self.rollouts, 1)
        sizes = [("responses", size) for size in self.responses]
        for name, size in (*sizes, ("equal_time_responses", self.equal_time_responses)):
            if self.rollouts % size:
                raise ValueError(f"{name}: {size} does not divide the {self.rollouts} roll-outs")
        if len(self.equal_time_updates) != len(self.algorithms) or min(self.equal_time_updates) < 1:
            given = list(self.equal_time_updates)
            raise ValueError(f"equal_time_updates: {given} is not one number for each algorithm")
        return self

    def policy(self, algorithm: Algorithm, responses: int, seed: int) -> roles.Policy:
        about = {"algorithm": algorithm, "prompts": self.rollouts // responses, "responses": responses}
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed, **about)

    def in_equal_time(self, algorithm: Algorithm, seed: int) -> roles.Policy:
        """Return the policy that is trained for as long as those of the other algorithms."""
        updates = self.equal_time_updates[self.algorithms.index(algorithm)]
        return self.policy(algorithm, self.equal_time_responses, seed).changed(num_updates=updates)

    def equal_rollouts(self) -> tuple[roles.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.algorithms, self.responses, self.seeds))

    def policies(self) -> tuple[roles.Policy, ...]:
        timed = (self.in_equal_time(*cell) for cell in product(self.algorithms, self.seeds))
        return tuple(dict.fromkeys([*self.equal_rollouts(), *timed]))


EQUIVALENCE_MARGIN = 0.01
"""Difference in exact accuracy within which two algorithms count as equal: about a quarter of what PPO gains at the
rung of the comparison (0.044 at 55k)."""

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


def measure(P: Params, made: Folders) -> Tables:
    """Return accuracy and gain by algorithm and responses per prompt, and each algorithm's difference from PPO.

    The further tables are training.csv (every update) and cost.csv (roll-outs and seconds of every policy).
    """
    found = Collector(P, made)
    before, accuracy = found.before(), {}  # [seed, prompt]; by algorithm [responses, seed, prompt]
    for name in P.algorithms:
        cells = [([P.policy(name, size, seed) for seed in P.seeds], size) for size in P.responses]
        after = [found.after(policies, algorithm=name, responses_per_prompt=size) for policies, size in cells]
        accuracy[name] = np.array(after)
        found.by_size("sampled_exact", accuracy[name], P.responses, algorithm=name)
        found.by_size("gain", accuracy[name] - before, P.responses, algorithm=name)
    others = [name for name in P.algorithms if name != "ppo"]
    for name in others:
        difference = accuracy[name] - accuracy["ppo"]
        found.by_size("minus_ppo", difference, P.responses, algorithm=name)
        whole = _mean(difference.mean(0))
        row = summary_row("minus_ppo_in_all", whole, algorithm=name)
        row |= {"margin": EQUIVALENCE_MARGIN, "equivalent": bool(max(-whole.low, whole.high) < EQUIVALENCE_MARGIN)}
        if name == "grpo":
            gain = _mean((accuracy["ppo"] - before).mean(0))
            found.summary.append(summary_row("gain_in_all", gain, algorithm="ppo"))
            result = CLAIM.judge({"GRPO minus PPO": whole, "PPO gain": gain})
            row |= {"verdict": result.verdict}
        found.summary.append(row)
    timed = {name: _in_equal_time(P, found, name, accuracy[name]) for name in P.algorithms}
    for name in others:
        row = summary_row("minus_ppo_in_equal_time", _mean(timed[name] - timed["ppo"]), algorithm=name)
        found.summary.append(row | {"responses_per_prompt": P.equal_time_responses})
    return found.tables(result, extra={"training.csv": training(P, made), "cost.csv": cost(P, made)})


def _mean(values: np.ndarray) -> Interval:
    """The interval of the mean of [seed, prompt]."""
    return nested_bootstrap(values, np.mean, rng=new_rng(), on="means")


def _in_equal_time(P: Params, found: Collector, name: Algorithm, equal_rollouts: np.ndarray) -> np.ndarray:
    """Accuracy [seed, prompt] of the policies that were trained for equal time; adds their rows, unless they are among
    those of equal roll-outs [responses, seed, prompt]."""
    policies = [P.in_equal_time(name, seed) for seed in P.seeds]
    if policies[0] in P.equal_rollouts():
        return equal_rollouts[P.responses.index(P.equal_time_responses)]
    return found.after(policies, algorithm=name, num_updates=policies[0].num_updates)


def training(P: Params, made: Folders) -> pd.DataFrame:
    """Return every update of every policy of equal roll-outs, as `draw_training` takes it."""
    columns = ["update", "proxy", "gold", "exact", "kl_nats", "response_tokens", "finished"]
    tables = [read_metrics(made, policy)[columns].assign(**about_policy(policy)) for policy in P.equal_rollouts()]
    return pd.concat(tables, ignore_index=True)


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw the gain by algorithm at equal roll-outs, and the difference from PPO with the margin of equivalence.

    Args:
        runs: ``algorithm``, ``responses_per_prompt``, ``stage``, ``seed``, ``metric``, ``value``; the metric
            ``sampled_exact`` is drawn.
        summary: the common columns, ``algorithm``, ``responses_per_prompt``, ``margin``, ``verdict``; quantities
            ``gain`` and ``minus_ppo`` (by algorithm and size), ``minus_ppo_in_all`` (by algorithm; GRPO's has the
            verdict).
    """
    grpo = style.select(summary, "minus_ppo_in_all", algorithm="grpo").iloc[0]
    caption = (
        f"{style.interval_caption(summary, 'dots: seeds; bars: ')} Shaded: differences that count as none "
        f"(margin {grpo.margin:g}). GRPO minus PPO in all: {style.signed_interval(grpo)}. {CLAIM.id}: {grpo.verdict}."
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
        shift = 0.22 * (index - (len(names) - 1) / 2)
        place = {size: spot + shift for spot, size in enumerate(sizes)}
        dots = sampled[sampled["algorithm"] == name]
        dots = dots.assign(value=dots["value"] - dots["seed"].map(start), place=dots["responses_per_prompt"].map(place))
        style.draw_dots(left, dots, "place", color)
        for axis, quantity in ((left, "gain"), (right, "minus_ppo"))[: 1 if name == "ppo" else 2]:
            rows = style.select(summary, quantity, algorithm=name)
            style.draw_estimates(axis, rows.assign(place=rows["responses_per_prompt"].map(place)), "place", **look)
        whole = style.select(summary, "minus_ppo_in_all", optional=True, algorithm=name)
        style.draw_estimates(right, whole.assign(place=len(sizes) + shift), "place", **look)
    left.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    right.set_xticks(range(len(sizes) + 1), [*map(str, sizes), "mean"])
    left.set(title="gain at equal roll-outs", xlabel="responses per prompt", ylabel="accuracy, trained minus SFT")
    right.set(title="distance from PPO", xlabel="responses per prompt", ylabel="accuracy, minus PPO")
    legend(handles, ncols=3)
    return figure


@style.styled
def draw_training(metrics: pd.DataFrame) -> Figure:
    """Draw gold reward and KL update by update: a column for each number of responses per prompt, every seed a line.

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
    for (row, metric, window), (column, size) in product(((0, "gold", 5), (1, "kl_nats", 1)), enumerate(sizes)):
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
        axis.set(**({"xlabel": "update"} if row else {"title": f"{size} responses"}))
    axes[0, 0].set(ylabel="gold reward")
    axes[1, 0].set(ylabel="KL to reference (nats)")
    looks = [style.ALGORITHMS[name] for name in names]
    legend([Line2D([], [], color=color, label=label) for label, color, _ in looks], ncols=3)
    return figure
