"""Published chat models: where each is found, at which revision, and how large it is. Nothing here imports torch."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Checkpoint(BaseModel):
    """A published chat model.

    Attributes:
        name: what parameters call it.
        repo: its id on the Hugging Face hub; None for the model that comes in a package instead.
        revision: the commit that is loaded.
        num_params: parameters, tied embeddings counted once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    repo: str | None = None
    revision: str | None = None
    num_params: float


CHECKPOINTS: dict[str, Checkpoint] = {
    item.name: item
    for item in (
        Checkpoint(name="smollm2-135m", num_params=134.5e6),
        *(
            Checkpoint(name=name, repo=repo, revision=revision, num_params=num_params)
            for name, repo, revision, num_params in (
                (
                    "smollm2-135m-hub",
                    "HuggingFaceTB/SmolLM2-135M-Instruct",
                    "12fd25f77366fa6b3b4b768ec3050bf629380bac",
                    134.5e6,
                ),
                (
                    "smollm2-360m",
                    "HuggingFaceTB/SmolLM2-360M-Instruct",
                    "a10cc1512eabd3dde888204e902eca88bddb4951",
                    361.8e6,
                ),
                (
                    "smollm2-1.7b",
                    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
                    "31b70e2e869a7173562077fd711b654946d38674",
                    1.711e9,
                ),
                ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775", 494.0e6),
                ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "989aa7980e4cf806f80c7fef2b1adb7bc71aa306", 1.544e9),
                ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "aa8e72537993ba99e69dfaafa59ed015b17504d1", 3.086e9),
                ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "a09a35458c702b33eeacc393d103063234e8bc28", 7.616e9),
                (
                    "llama-3.2-1b",
                    "meta-llama/Llama-3.2-1B-Instruct",
                    "9213176726f574b556790deb65791e0c5aa438b6",
                    1.236e9,
                ),
                (
                    "llama-3.2-3b",
                    "meta-llama/Llama-3.2-3B-Instruct",
                    "0cb88a4f764b7a12671c53f0838cd831a0843b95",
                    3.213e9,
                ),
                (
                    "llama-3.1-8b",
                    "meta-llama/Llama-3.1-8B-Instruct",
                    "0e9e39f249a16976918f6564b8830bc894c89659",
                    8.030e9,
                ),
            )
        ),
    )
}


def checkpoint(name: str) -> Checkpoint:
    """A checkpoint by name. Raises ValueError that lists the names."""
    if name not in CHECKPOINTS:
        raise ValueError(f"checkpoint: unknown model {name!r}; allowed: {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[name]


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
