"""Published chat models: where each is found, at which revision, and how large it is. Nothing here imports torch."""

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from rlhfscale.models.shapes import Shape


class Checkpoint(BaseModel):
    """A published chat model.

    Attributes:
        name: what parameters call it.
        repo: its id on the Hugging Face hub; None for the model that comes in a package instead.
        revision: the commit that is loaded.
        shape: its architecture, as its published config.json says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    repo: str | None = None
    revision: str | None = None
    shape: Shape

    @property
    def num_params(self) -> int:
        """Parameters, tied embeddings counted once."""
        return self.shape.num_params


_PUBLISHED = yaml.safe_load(Path(__file__).with_name("checkpoints.yaml").read_text())
CHECKPOINTS: dict[str, Checkpoint] = {
    "smollm2-135m": Checkpoint(name="smollm2-135m", shape=_PUBLISHED["smollm2-135m-hub"]["shape"]),  # in a package
    **{name: Checkpoint(name=name, **about) for name, about in _PUBLISHED.items()},
}


def checkpoint(name: str) -> Checkpoint:
    """A checkpoint by name. Raises ValueError that lists the names."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint: unknown model {name!r}; allowed: {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name]


def shape_of(name: str) -> Shape:
    """The shape of a published model. Raises ValueError for a folder or a name of which nothing is known."""
    name = {"smollm2": "smollm2-135m"}.get(name, name)
    if name not in CHECKPOINTS:
        raise ValueError(f"{name}: a model of unknown shape cannot be planned; known: {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name].shape


def download(found: Checkpoint) -> Path:
    """The folder of a hub model in the local cache, fetched at its revision where it is not there yet.

    Raises:
        FileNotFoundError: it is not in the cache and the hub cannot be reached; names the file and the command.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert found.repo is not None
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(found.repo, revision=found.revision, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{found.name}: model.safetensors of {found.repo} is not in the cache and could not be fetched"
            f" ({type(error).__name__}); where there is a network: hf download {found.repo} --revision {found.revision}"
        ) from error
