"""What the parameters of figures share: a recipe, seeds, and for many one rung that is trained in several ways."""

from typing import ClassVar, Self

from pydantic import model_validator

from rlhfscale.bed.recipe import Recipe
from rlhfscale.chat.recipe import CheckpointRecipe
from rlhfscale.runs.spec import Spec
from rlhfscale.study import recipes, roles
from rlhfscale.study.params import FigureParams, field


class RecipeFigure(FigureParams):
    """What all figures share: the recipe.

    Class attributes:
        from_scratch: what it needs that a ladder of published checkpoints does not have; empty for figures that can be
            made on either ladder.
    """

    from_scratch: ClassVar[str] = ""

    recipe: str = field(role="fixed", doc="tier whose recipe.yaml holds every setting that is not varied here")

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        recipe = recipes.load(self.recipe)
        if self.from_scratch and isinstance(recipe, CheckpointRecipe):
            raise ValueError(f"recipe: {self.recipe!r} is a ladder of published checkpoints; {self.from_scratch}")
        return self

    @property
    def settings(self) -> Recipe | CheckpointRecipe:
        return recipes.load(self.recipe)


class StudyFigure(RecipeFigure):
    """What the figures that test claims share: the recipe and the seeds."""

    seeds: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="each reseeds labels, reward model, policy training and evaluation samples"
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: {list(self.seeds)} must be different and not negative")
        return self


class OnePolicy(StudyFigure):
    """One SFT rung that is trained in several ways."""

    policy_rung: str = field(role="fixed", doc="rung of the policies")

    @model_validator(mode="after")
    def _check_policy_rung(self) -> Self:
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        return self

    def before(self, seed: int) -> roles.Samples:
        """Sampled responses of the SFT model that the policies of a seed start from."""
        return self.settings.evaluation(self.settings.start(self.policy_rung, seed), seed)

    def evaluation(self, policy: roles.Policy) -> roles.Samples:
        """Sampled responses of a trained policy to the same prompts."""
        return self.settings.evaluation(policy, policy.seed)

    def policies(self) -> tuple[roles.Policy, ...]:
        """Every trained policy."""
        raise NotImplementedError

    def specs(self) -> tuple[Spec, ...]:
        trained = self.policies()
        found = [*trained, *map(self.evaluation, trained), *map(self.before, self.seeds)]
        return tuple(dict.fromkeys(found))

    def _splits(self, name: str, prompts: int, responses: int) -> None:
        """Raise unless the roll-outs of an update split into the recipe's number of minibatches."""
        steps = self.settings.steps_per_epoch
        if prompts < 1 or prompts * responses % steps:
            raise ValueError(f"{name}: {prompts} prompts x {responses} do not split into {steps} minibatches")
