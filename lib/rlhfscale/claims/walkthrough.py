"""PPO by hand, then live: the models of the live run, its tables and its picture.

The tables and pictures of the part by hand are in `study.by_hand`; the notebook reaches them by this module's name.
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
from rlhfscale.stats.bootstrap import Interval, bootstrap, summary_row
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
    """One live run of PPO, on models that are small enough to be trained while a reader waits.

    The figure trains its own models: a rung is pretrained on few documents and fine-tuned on demonstrations of one task
    family. All other settings are the recipe's.
    """

    figure: ClassVar[str] = "00_walkthrough"
    from_scratch: ClassVar[str] = "00_walkthrough pretrains a rung of its own"
    title: ClassVar[str] = "PPO by hand, then live"
    families: ClassVar[tuple[str, ...]] = ("registers",)
    bed_seed: ClassVar[int] = 1
    """Seed of the reward model and of the held-out responses; ``seed`` is that of the live run alone."""

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
        """The recipe with the sizes of this figure's models."""
        return super().settings.model_copy(
            update={
                "pretrain_documents": self.pretrain_documents,
                "sft_documents": self.sft_documents,
                "label_rungs": (self.rung,),
                "reward_prompts": self.label_prompts,
                "reward_muon_lr": 0.005,  # with few labels a higher rate orders more held-out pairs correctly
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
        """Responses of the SFT model to the held-out prompts, before the live run."""
        return self._on_bed(self.settings.evaluation(self.sft, self.bed_seed))

    def _on_bed(self, samples: specs.Samples) -> specs.Samples:
        return samples.changed(model=self.sft, families=self.families)

    def specs(self) -> tuple[Spec, ...]:
        return self.sft, self.reward_model, self.before


def misconceptions(count: int) -> pd.DataFrame:
    """Return what some demonstrators do instead, for the most frequent operations of the live run's family."""
    (name,) = Params.families
    family = tasks.FAMILIES[name]
    known = [(operation, family.misconceptions[operation]) for operation in family.operations[:count]]
    rows = [[operation, each.words, f"{each.share:.0%}"] for operation, each in known]
    return pd.DataFrame(rows, columns=["operation", "what some demonstrators do instead", "share who do"])


def measure(P: Params, made: Folders, metrics: pd.DataFrame, after: Responses) -> Tables:
    """Return the live run's metrics update by update, and accuracy on held-out prompts before and after it.

    Args:
        P: the notebook's parameters.
        made: folders of the artifacts.
        metrics: what the trainer returned, with the columns ``gold`` and ``exact`` of `LiveRun.on_update`.
        after: the trained policy's responses to the prompts of ``P.before``, see `held_out`.
    """
    live = f"live-{P.hash}"  # the live run is no artifact: it is made anew each time
    runs = [metrics.melt("update", var_name="metric").assign(node=live, num_prompts=P.prompts_per_update)]
    summary, prompts, exact = [], [], {}
    for stage, node, responses in (("sft", P.before.key, read_responses(made, P.before)), ("ppo", live, after)):
        exact[stage] = responses.exact.mean(1)
        about = {"node": node, "metric": "sampled_exact", "stage": stage}
        row = about | {"value": exact[stage].mean(), "num_prompts": responses.num_prompts}
        runs.append(pd.DataFrame([row]))
        per_prompt = pd.DataFrame(about | {"seed": P.seed, "value": exact[stage]})
        prompts.append(per_prompt.rename_axis("prompt_id").reset_index())
        summary.append(summary_row("sampled_exact", _mean(exact[stage]), stage=stage))
    summary.append(summary_row("gain", _mean(exact["ppo"] - exact["sft"])))
    about = {"figure": P.figure, "command": command(P), "rung": P.rung, "num_params": num_params(P.rung)}
    table = pd.concat(runs, ignore_index=True).assign(seed=P.seed, **about)
    return Tables(table, pd.DataFrame(summary), pd.concat(prompts))


def _mean(values: np.ndarray) -> Interval:
    """The interval of the mean over prompts."""
    return bootstrap(values, np.mean, unit="prompt", rng=new_rng(), on="means")


class LiveRun:
    """The live run's side of a trainer: gives it prompts, grades its responses, and draws every fourth update.

    Args:
        P: the notebook's parameters.
    """

    def __init__(self, P: Params):
        self.P = P
        stream = tasks.problems((P.seed, STREAM["policy"]), "train", P.families)
        self.problems = [[next(stream) for _ in range(P.prompts_per_update)] for _ in range(P.num_updates)]
        self.records: list[dict[str, float]] = []
        self._shown = None

    def prompts(self, update: int) -> list[list[int]]:
        """Return the token ids of an update's prompts."""
        return encode_prompts(self.problems[update])

    def on_update(self, update: int, metrics: dict[str, float], completions: "Completions") -> dict[str, float]:
        """Grade an update's responses, and return what is to be logged beside the trainer's metrics."""
        graded = label(self.problems[update], completions)
        found = {"gold": float(graded.gold.mean()), "exact": float(graded.exact.mean())}
        self.records.append({"update": update} | metrics | found)
        if (update + 1) % 4 == 0 or update + 1 == self.P.num_updates:
            self.draw()
        return found

    def draw(self) -> None:
        """Show the run so far; the new picture replaces the last one."""
        from IPython.display import display

        picture = draw(pd.DataFrame(self.records).melt("update", var_name="metric"))
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)


def held_out(P: Params, trainer: "Trainer") -> Responses:
    """Return the trained policy's responses to the prompts of ``P.before``, with the same random draws."""
    from rlhfscale.bed import stages  # it imports torch

    with trainer.networks.decoder() as policy:
        return stages.draw(P.before, policy)


@style.styled
def draw(runs: pd.DataFrame, summary: pd.DataFrame | None = None) -> Figure:
    """Draw one run, finished or not: the verifier's reward, the reward model's score, and the KL, by update.

    Args:
        runs: ``update``, ``metric`` (of which ``gold``, ``proxy`` and ``kl_nats`` are drawn), ``value``; rows without
            an update are left out.
        summary: the common columns and ``stage``; quantity ``sampled_exact`` (sft | ppo) for the caption.
    """
    updates = runs.dropna(subset="update").pivot_table(index="update", columns="metric", values="value")
    caption = "Dots: updates of one run; lines: mean over five updates."
    if summary is not None:
        rows = [style.select(summary, "sampled_exact", stage=stage).iloc[0] for stage in ("sft", "ppo")]
        before, after = (f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]" for row in rows)
        caption += (
            f" Exactly right on {rows[0].num_prompts} held-out prompts: {before} before, {after} after"
            f" (95% intervals, {rows[0].ci_method})."
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
    """Look a name up in `study.by_hand`, which imports torch: making a plan must not wait for that."""
    from rlhfscale.study import by_hand

    return getattr(by_hand, name)
