"""Published chat models: where each is found, at which revision, and how large it is. Nothing here imports torch."""

from pathlib import Path
from typing import Any

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


def _shape(layers: int, width: int, feed_forward: int, heads: int, kv_heads: int, vocab: int, **options: Any) -> Shape:
    sizes = {"layers": layers, "width": width, "feed_forward": feed_forward, "heads": heads, "kv_heads": kv_heads}
    return Shape(**sizes, vocab=vocab, **{"head_width": 128, "tied": True} | options)


_HUB = {  # name: hub id and commit, shape
    "smollm2-135m-hub": (
        "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac",
        _shape(30, 576, 1536, 9, 3, 49152, head_width=64),
    ),
    "smollm2-360m": (
        "HuggingFaceTB/SmolLM2-360M-Instruct@a10cc1512eabd3dde888204e902eca88bddb4951",
        _shape(32, 960, 2560, 15, 5, 49152, head_width=64),
    ),
    "smollm2-1.7b": (
        "HuggingFaceTB/SmolLM2-1.7B-Instruct@31b70e2e869a7173562077fd711b654946d38674",
        _shape(24, 2048, 8192, 32, 32, 49152, head_width=64),
    ),
    "qwen2.5-0.5b": (
        "Qwen/Qwen2.5-0.5B-Instruct@7ae557604adf67be50417f59c2c2f167def9a775",
        _shape(24, 896, 4864, 14, 2, 151936, head_width=64, attention_bias=True),
    ),
    "qwen2.5-1.5b": (
        "Qwen/Qwen2.5-1.5B-Instruct@989aa7980e4cf806f80c7fef2b1adb7bc71aa306",
        _shape(28, 1536, 8960, 12, 2, 151936, attention_bias=True),
    ),
    "qwen2.5-3b": (
        "Qwen/Qwen2.5-3B-Instruct@aa8e72537993ba99e69dfaafa59ed015b17504d1",
        _shape(36, 2048, 11008, 16, 2, 151936, attention_bias=True),
    ),
    "qwen2.5-7b": (
        "Qwen/Qwen2.5-7B-Instruct@a09a35458c702b33eeacc393d103063234e8bc28",
        _shape(28, 3584, 18944, 28, 4, 152064, tied=False, attention_bias=True),
    ),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B-Instruct@9213176726f574b556790deb65791e0c5aa438b6",
        _shape(16, 2048, 8192, 32, 8, 128256, head_width=64),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B-Instruct@0cb88a4f764b7a12671c53f0838cd831a0843b95",
        _shape(28, 3072, 8192, 24, 8, 128256),
    ),
    "llama-3.1-8b": (
        "meta-llama/Llama-3.1-8B-Instruct@0e9e39f249a16976918f6564b8830bc894c89659",
        _shape(32, 4096, 14336, 32, 8, 128256, tied=False),
    ),
    "llama-3.1-70b": (
        "meta-llama/Llama-3.1-70B-Instruct@1605565b47bb9346c5515c34102e054115b4f98b",
        _shape(80, 8192, 28672, 64, 8, 128256, tied=False),
    ),
    "llama-3.1-405b": (
        "meta-llama/Llama-3.1-405B-Instruct@be673f326cab4cd22ccfef76109faf68e41aa5f1",
        _shape(126, 16384, 53248, 128, 8, 128256, tied=False),
    ),
}
CHECKPOINTS: dict[str, Checkpoint] = {
    "smollm2-135m": Checkpoint(name="smollm2-135m", shape=_HUB["smollm2-135m-hub"][1]),  # it comes in a package
    **{
        name: Checkpoint(name=name, repo=source.partition("@")[0], revision=source.partition("@")[2], shape=shape)
        for name, (source, shape) in _HUB.items()
    },
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
