"""Parameters of the figure on compute, of pretraining and of RLHF (C10), and its specs."""

from typing import ClassVar, Self

from pydantic import model_validator

from rlhfscale.bed import ladder, specs
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.fits import MIN_POINTS
from rlhfscale.study.params import field
from rlhfscale.study.sweeps import OnePolicy


class ComputeReturns(OnePolicy):
    """C10: what each doubling of compute brings, spent on pretraining or on RLHF of the same policy."""

    figure: ClassVar[str] = "10_pretraining_vs_rlhf"
    from_scratch: ClassVar[str] = "10_pretraining_vs_rlhf pretrains its rungs on different numbers of documents"
    title: ClassVar[str] = "RLHF returns less for each doubling of compute than pretraining"
    claims: ClassVar[tuple[str, ...]] = ("C10",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    documents: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="pretraining documents, each a doubling of the last"
    )
    updates: tuple[int, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="PPO updates, each about twice the last; labels grow with them"
    )
    ladder_rungs: tuple[str, ...] = field(
        role="scientific", min_length=MIN_POINTS, doc="rungs with the recipe's documents, for pretraining by size"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        self.settings.check_rungs("ladder_rungs", self.ladder_rungs)
        for name in ("documents", "updates"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)) or values[0] < 1:
                raise ValueError(f"{name}: {list(values)} must rise, from at least 1")
        if self.documents[0] < 64:
            raise ValueError(f"documents: {self.documents[0]} is below 64, one batch")
        return self

    def pretrained(self, documents: int) -> specs.SFT:
        """The policy's rung pretrained on that many documents, fine-tuned as ever."""
        sft = self.settings.sft(self.policy_rung)
        return sft.changed(base=sft.base.changed(num_documents=documents))

    def pretraining(self) -> dict[str, dict[int, specs.SFT]]:
        """The models that were only pretrained and fine-tuned: by documents, and by the rung's parameters."""
        return {
            "pretraining": {size: self.pretrained(size) for size in self.documents},
            "pretraining, by rung": {
                ladder.rung(name).num_params: self.settings.sft(name) for name in self.ladder_rungs
            },
        }

    def sampled(self, sft: specs.SFT, seed: int) -> specs.Samples:
        return self.settings.evaluation(sft, seed)

    def policy(self, updates: int, seed: int) -> specs.Policy:
        """A policy whose updates and whose reward model's labels grow together: the recipe's ratio of the two."""
        recipe = self.settings
        rungs = len(recipe.label_rungs)
        share = max(1, round(recipe.reward_prompts * updates / recipe.ppo_updates / rungs))
        reward_model = recipe.reward_model(self.reward_model_rung, seed)
        data = tuple(part.changed(num_prompts=share) for part in reward_model.data)
        reward_model = reward_model.changed(data=data, num_prompts=share * rungs)
        policy = recipe.policy(self.policy_rung, self.reward_model_rung, seed)
        return policy.changed(reward_model=reward_model, num_updates=updates)

    def policies(self) -> tuple[specs.Policy, ...]:
        return tuple(self.policy(size, seed) for size in self.updates for seed in self.seeds)

    def specs(self) -> tuple[Spec, ...]:
        models = [model for by_size in self.pretraining().values() for model in by_size.values()]
        sampled = [self.sampled(model, seed) for model in models for seed in self.seeds]
        # their compute is counted too
        counted = [model.base for model in models]
        counted += [part for policy in self.policies() for part in policy.reward_model.data]
        return tuple(dict.fromkeys([*super().specs(), *models, *sampled, *counted]))
