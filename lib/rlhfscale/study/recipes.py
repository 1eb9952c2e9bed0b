"""The recipe of a tier: every setting that its figures hold fixed, read from ``params/<tier>/recipe.yaml``.

A figure's own parameters are what it varies (rungs, seeds, sizes). All else comes from the recipe: so two figures that
need the same model describe it in the same way, and share it.
"""

from functools import lru_cache

from pydantic import ValidationError

from rlhfscale.bed import ladder
from rlhfscale.bed.recipe import Recipe
from rlhfscale.chat.recipe import CheckpointRecipe
from rlhfscale.models.checkpoints import CHECKPOINTS, checkpoint
from rlhfscale.runs.paths import project_root
from rlhfscale.study.params import ParamsError, explain, read_yaml


@lru_cache
def load(tier: str) -> Recipe | CheckpointRecipe:
    """The recipe of a tier; one that says ``ladder: checkpoints`` is of published models.

    Raises ParamsError, one line that names the file and the field.
    """
    file = f"params/{tier}/recipe.yaml"
    values = read_yaml(project_root() / file)
    kind = CheckpointRecipe if "ladder" in values else Recipe
    try:
        return kind(**values)
    except ValidationError as error:
        message = "; ".join(explain(problem, list(kind.model_fields)) for problem in error.errors())
        raise ParamsError(f"{file}: {message}") from None


def num_params(rung: str) -> int:
    """Parameters of a rung of either ladder: of one trained from scratch without its embeddings, of a published
    checkpoint all. Raises ValueError for a name on neither."""
    return checkpoint(rung).num_params if rung in CHECKPOINTS else ladder.rung(rung).num_params
