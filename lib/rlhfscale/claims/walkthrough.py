"""PPO by hand, then live: the models of the live run, its tables and its picture.

The arithmetic by hand, and the sketches of formulas, are in `study.by_hand`; the notebook takes them from here.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import model_validator

from rlhfscale.bed import specs, tasks
from rlhfscale.bed.demonstrations import STREAM, encode_prompts
from rlhfscale.bed.recipe import Recipe
from rlhfscale.bed.responses import Responses, label
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import bootstrap, summary_row
from rlhfscale.study import style
from rlhfscale.study.artifacts import Folders, read_responses
from rlhfscale.study.figure import RecipeFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.tables import Tables, command, new_rng

if TYPE_CHECKING:
    from rlhfscale.rl.loop import Trainer
    from rlhfscale.samplers import Completions


class Params(RecipeFigure):
    """PPO by hand, then one live run on a bed small enough to be made while a reader waits.

    The bed is its own: a rung pretrained on few documents, then fine-tuned on demonstrations of one family by careless
    demonstrators, so that there is much to gain in little time. All that is not named here is the recipe's.
    """

    figure: ClassVar[str] = "00_walkthrough"
    from_scratch: ClassVar[str] = "00_walkthrough pretrains a rung of its own"
    title: ClassVar[str] = "PPO by hand, then live"
    families: ClassVar[tuple[str, ...]] = ("registers",)
    bed_seed: ClassVar[int] = 1
    """Of the reward model and of the held-out responses: the live run's seed changes nothing but the live run."""

    seed: int = field(role="scientific", ge=1, doc="seed of the live run")
    num_updates: int = field(role="scientific", ge=1, doc="updates of the live run")
    prompts_per_update: int = field(role="scientific", ge=2, multiple_of=2, doc="prompts, one response to each")
    epochs: int = field(role="scientific", ge=1, doc="passes over an update's roll-outs, in two minibatches each")
    policy_lr: float = field(role="scientific", gt=0, doc="learning rate of the policy")
    kl_coefficient: float = field(role="scientific", ge=0, doc="beta, in standard deviations of the proxy for a nat")
    clip: float = field(role="scientific", gt=0, doc="epsilon, half-width of the ratio's clipping range")
    lam: float = field(role="scientific", ge=0, le=1, doc="lambda of GAE")
    rung: str = field(role="fixed", doc="rung of policy, critic and reward model")
    pretrain_documents: int = field(role="fixed", ge=64, doc="documents it is pretrained on")
    sft_documents: int = field(role="fixed", ge=64, doc="demonstrations it is fine-tuned on")
    slip: float = field(role="fixed", ge=0, lt=1, doc="share of wrong tokens in these demonstrations")
    label_prompts: int = field(role="fixed", ge=1, doc="prompts whose responses are compared for the reward model")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("rung", (self.rung,))
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,)

    @property
    def settings(self) -> Recipe:
        """The recipe with this bed's sizes."""
        return super().settings.model_copy(
            update={
                "pretrain_documents": self.pretrain_documents,
                "sft_documents": self.sft_documents,
                "label_rungs": (self.rung,),
                "reward_prompts": self.label_prompts,
                "reward_muon_lr": 0.005,  # few labels: a higher rate orders more held-out pairs rightly
            }
        )

    @property
    def sft(self) -> specs.SFT:
        return self.settings.sft(self.rung).changed(families=self.families, slip=self.slip)

    @property
    def reward_model(self) -> specs.RewardModel:
        spec = self.settings.reward_model(self.rung, self.bed_seed)
        data, held_out = (tuple(map(self._on_bed, part)) for part in (spec.data, spec.held_out))
        return spec.changed(base=self.sft, data=data, held_out=held_out)

    @property
    def before(self) -> specs.Samples:
        """Responses to the held-out prompts before the live run."""
        return self._on_bed(self.settings.evaluation(self.sft, self.bed_seed))

    def _on_bed(self, samples: specs.Samples) -> specs.Samples:
        return samples.changed(model=self.sft, families=self.families)

    def specs(self) -> tuple[Spec, ...]:
        return self.sft, self.reward_model, self.before


def measure(P: Params, folders: Folders, metrics: pd.DataFrame, after: Responses) -> Tables:
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


class LiveRun:
    """Prompts for a trainer and what the verifier says of its responses, drawn while it trains.

    Args:
        P: the notebook's parameters.
        every: updates between two drawings.
    """

    def __init__(self, P: Params, every: int = 4):
        self.P, self.every = P, every
        stream = tasks.problems((P.seed, STREAM["policy"]), "train", P.families)
        self.problems = [[next(stream) for _ in range(P.prompts_per_update)] for _ in range(P.num_updates)]
        self.records: list[dict[str, float]] = []
        self._shown = None

    def prompts(self, update: int) -> list[list[int]]:
        """Token ids of an update's prompts."""
        return encode_prompts(self.problems[update])

    def on_update(self, update: int, metrics: dict[str, float], completions: "Completions") -> dict[str, float]:
        """Grade an update's responses, and draw; returns what is to be logged beside the trainer's metrics."""
        graded = label(self.problems[update], completions)
        found = {"gold": float(graded.gold.mean()), "exact": float(graded.exact.mean())}
        self.records.append({"update": update} | metrics | found)
        if (update + 1) % self.every == 0 or update + 1 == self.P.num_updates:
            self.draw()
        return found

    def draw(self) -> None:
        """Show the run so far, in place of the picture before."""
        from IPython.display import display

        picture = draw(pd.DataFrame(self.records).melt("update", var_name="metric"))
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)


def held_out(P: Params, trainer: "Trainer") -> Responses:
    """The trained policy's responses to the prompts of ``P.before``, with the same draws."""
    from rlhfscale.bed import stages  # it imports torch

    with trainer.networks.decoder() as policy:
        return stages.draw(P.before, policy)


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Three panels of one run, also of one that still goes on: gold, proxy and KL by update.

    Args:
        runs: ``update``, ``metric`` (of which ``gold``, ``proxy`` and ``kl_nats`` are drawn), ``value``; rows without
            an update are left out. Dots are updates, lines their running mean over five.
        summary: the common columns and ``stage``; quantity ``sampled_exact`` (sft | ppo) for the caption.
    """
    updates = runs.dropna(subset="update").pivot_table(index="update", columns="metric", values="value")
    caption = "Dots: updates of one run; lines: mean over five updates."
    if summary is not None:
        texts = {}
        for stage in ("sft", "ppo"):
            row = style.select(summary, "sampled_exact", stage=stage).iloc[0]
            texts[stage] = f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
        caption += (
            f" Exactly right on {row.num_prompts} held-out prompts: {texts['sft']} before, {texts['ppo']} after"
            f" (95% intervals, {row.ci_method})."
        )
    figure, axes, _ = style.new_figure(1, 3, 1.9, caption)
    panels = {
        "gold": ("gold", "verifier's reward", style.CATEGORIES[2]),
        "proxy": ("proxy", "reward model's score (s.d.)", style.CATEGORIES[1]),
        "kl_nats": ("KL to reference", "nats for each response", style.CATEGORIES[0]),
    }
    for axis, (metric, (title, unit, color)) in zip(axes, panels.items(), strict=True):
        values = updates[metric]
        axis.scatter(values.index, values, s=7, color=[color], alpha=0.45, linewidths=0)
        axis.plot(values.rolling(5, min_periods=1, center=True).mean(), color=color, linewidth=1.8)
        axis.set(title=title, ylabel=unit, xlabel="update")
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[2].set_ylim(bottom=min(0.0, updates["kl_nats"].min()))
    return figure


def __getattr__(name: str) -> Any:
    """The tables and sketches of part 1, from `study.by_hand`. They need torch, which a plan does without."""
    from rlhfscale.study import by_hand

    return getattr(by_hand, name)
