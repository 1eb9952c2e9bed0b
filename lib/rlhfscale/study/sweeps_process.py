"""Parameters of the figure on process supervision (C8), and its specs."""

from itertools import product
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from rlhfscale.bed import specs
from rlhfscale.bed.recipe import FAMILIES
from rlhfscale.runs.spec import Spec
from rlhfscale.study.params import field
from rlhfscale.study.sweeps import OnePolicy

Kind = Literal["outcome", "process"]
KINDS: tuple[Kind, ...] = ("outcome", "process")
EVERY = "both"
"""Name of the training data of all families."""
TRAINED_ON = (*FAMILIES, EVERY)


class ProcessSupervision(OnePolicy):
    """C8: outcome and process reward models from the same responses, on the task they were trained on and on others."""

    figure: ClassVar[str] = "08_process_supervision"
    from_scratch: ClassVar[str] = "08_process_supervision needs labels of steps, and answers to its questions have none"
    title: ClassVar[str] = "Process supervision wins on its own task and generalises worse"
    claims: ClassVar[tuple[str, ...]] = ("C8",)

    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    labelled_prompts: int = field(
        role="fixed", ge=2, doc="labelled prompts of each reward model, of one family or both"
    )
    aggregate: Literal["last", "min", "product"] = field(
        role="fixed", doc="how the probabilities of a response's steps make its score"
    )
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")
    ppo_rung: str = field(role="fixed", doc="reward-model rung that policies are trained against")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.ppo_rung not in self.reward_model_rungs:
            raise ValueError(f"ppo_rung: {self.ppo_rung!r} is not among reward_model_rungs")
        if self.labelled_prompts % len(self.settings.label_rungs):
            raise ValueError(f"labelled_prompts: {self.labelled_prompts} do not share out to the label rungs")
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def reward_model(self, kind: Kind, rung: str, trained_on: str, seed: int) -> specs.AnyRewardModel:
        families = FAMILIES if trained_on == EVERY else (trained_on,)
        outcome = self.settings.reward_model(rung, seed)
        share = self.labelled_prompts // len(outcome.data)
        data = tuple(part.changed(families=families, num_prompts=share) for part in outcome.data)
        outcome = outcome.changed(data=data, num_prompts=self.labelled_prompts)
        if kind == "outcome":
            return outcome
        shared = ("base", "data", "held_out", "num_prompts", "epochs", "lr", "muon_lr", "lora_rank", "seed")
        return specs.ProcessRewardModel(
            **{name: getattr(outcome, name) for name in shared},
            responses_per_batch=outcome.prompts_per_batch * self.settings.label_samples,
            aggregate=self.aggregate,
        )

    def cells(self) -> list[tuple[Kind, str, str]]:
        """Kind, rung and training data of each reward model."""
        return list(product(KINDS, self.reward_model_rungs, TRAINED_ON))

    @property
    def samples(self) -> specs.Samples:
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, kind: Kind, rung: str, trained_on: str, seed: int) -> specs.Scores:
        return self.settings.scores(self.samples, self.reward_model(kind, rung, trained_on, seed))

    def policy(self, kind: Kind, seed: int) -> specs.Policy:
        """The policy trained against a reward model of `ppo_rung` that was trained on every family."""
        policy = self.settings.policy(self.policy_rung, self.ppo_rung, seed)
        return policy.changed(reward_model=self.reward_model(kind, self.ppo_rung, EVERY, seed))

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(KINDS, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = [(*cell, seed) for cell in self.cells() for seed in self.seeds]
        models, scored = [self.reward_model(*cell) for cell in cells], [self.scores(*cell) for cell in cells]
        return (*super().specs(), self.samples, *models, *scored)
