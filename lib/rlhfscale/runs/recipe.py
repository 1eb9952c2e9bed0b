"""What the recipes of both ladders share: see `bed.recipe` and `chat.recipe`. Nothing here imports torch."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from rlhfscale.runs.policy_spec import Algorithm


class RecipeBase(BaseModel):
    """Settings of a tier. Subclasses have ``label_rungs``, ``ppo_policy_lr_of`` and a ``policy_lr`` of each algorithm.

    Class attributes:
        find: gives what is known of a rung by its name, and raises ValueError for a name that is not on the ladder.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    find: ClassVar[Callable[[str], Any]]

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: dict) -> dict:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    @model_validator(mode="after")
    def _rungs_on_ladder(self) -> Self:
        self.check_rungs("label_rungs", self.label_rungs)
        self.check_rungs("ppo_policy_lr_of", tuple(self.ppo_policy_lr_of))
        if bad := [rung for rung, rate in self.ppo_policy_lr_of.items() if rate <= 0]:
            raise ValueError(f"ppo_policy_lr_of: rates must be above 0, not those of {', '.join(bad)}")
        return self

    def check_rungs(self, name: str, rungs: tuple[str, ...]) -> None:
        """Raise ValueError, naming the field, unless these are different rungs of the ladder."""
        for rung in rungs:
            try:
                type(self).find(rung)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if len(set(rungs)) < len(rungs):
            raise ValueError(f"{name}: {list(rungs)} names a rung twice")

    def policy_lr(self, algorithm: Algorithm, rung: str) -> float:
        """AdamW rate of a policy's adapter."""
        common = getattr(self, f"{algorithm}_policy_lr")
        return self.ppo_policy_lr_of.get(rung, common) if algorithm == "ppo" else common
