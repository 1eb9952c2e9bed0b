"""Load models in fp32, bf16 or NF4, and what is asked of any model: its trunk, its fingerprint, its special tokens."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_fsdp_enabled
from transformers.utils import logging

from rlhfscale.models import parallel, sharding

logging.disable_progress_bar()  # of loading and saving weights: noise in a worker's log

POLICY, CRITIC, REWARD = "policy", "critic", "reward"


def load_policy(folder: Path) -> PreTrainedModel:
    """A causal language model in float32, in evaluation mode. Raises ValueError for the folder of a PEFT adapter."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: load its base, then peft.PeftModel.from_pretrained(base, folder)")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def load_scorer(folder: Path, *, init_seed: int | None = None) -> PreTrainedModel:
    """A sequence-classification model with one output (``score`` head), float32.

    Args:
        folder: a saved reward model, or a causal model if ``init_seed`` is given.
        init_seed: start from a causal model's trunk with a zero score head. Zero, so that before training every
            response scores alike and the seed decides nothing but the data order.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, local_files_only=True
    )
    if init_seed is not None:
        nn.init.zeros_(model.score.weight)
    return model


def lora_config(rank: int, alpha: float, targets: str | list[str] = "all-linear") -> LoraConfig:
    """LoRA on every linear layer of the decoder blocks (Hu et al. 2021; Schulman et al. 2025 find all layers best),
    or on the layers whose names end with one of ``targets``."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Within this context PEFT does not warn of what it mends by itself when it adds adapters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out|The following (rank|alpha)_pattern")
        yield


DTYPES = ("fp32", "bf16", "nf4")


def load_base(
    source: str | Path, dtype: str = "fp32", *, head: str = "causal", sharded: bool | None = None, **options
) -> PreTrainedModel:
    """A pretrained model in float32, bfloat16, or 4-bit NF4 with bfloat16 compute (Dettmers et al. 2023).

    Args:
        source: a transformers folder or a hub id.
        dtype: "fp32", "bf16" or "nf4".
        head: "causal" for a language model, "score" for a sequence classifier with one output.
        sharded: let each process keep a share of the weights only (see `sharding`). They are read into the memory of
            the CPU, one process of a machine after the other, and only shares reach a GPU. By default, if ``accelerate
            launch`` runs several processes with a configuration for FSDP.
        options: passed to ``from_pretrained``, such as ``revision``, ``local_files_only`` or ``device_map``.

    Raises:
        ValueError: an unknown dtype; a device_map for a sharded model; or accelerate would let transformers read the
            weights in one process only, for a sharding other than this one.
        ImportError: NF4 without bitsandbytes; the message says how to install it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    options["dtype"] = torch.float32 if dtype == "fp32" else torch.bfloat16
    if dtype == "nf4":
        options["quantization_config"] = _nf4()
    if head == "score":
        options["num_labels"] = 1
    auto = {"causal": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[head]
    if not (sharding.is_asked_for() if sharded is None else sharded):
        return close_nf4_trap(auto.from_pretrained(source, **options)).eval()
    if "device_map" in options:
        raise ValueError("device_map: a sharded model goes to each process's own GPU; leave it out")
    if is_fsdp_enabled():
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading: it leaves all processes but one without weights; set it to false"
        )
    for _ in parallel.in_turn():
        model = close_nf4_trap(auto.from_pretrained(source, device_map={"": "cpu"}, **options)).eval()
        model = sharding.shard(model)
    return model


def _nf4() -> BitsAndBytesConfig:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("dtype: nf4 needs bitsandbytes; install it with: make setup EXTRAS=qlora") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def close_nf4_trap(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 processors, in place.

    The repacked layers' forward pass has no gradient, so a loop that samples and then trains would learn from wrong
    gradients while the loss looks right (bitsandbytes 0.50; measured cosine to the true gradient 0.28).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # repacked already: bitsandbytes puts them back, in place, before it saves
    return model


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether any weight is stored in 4 or 8 bits."""
    return any(hasattr(parameter, "quant_state") or parameter.dtype == torch.int8 for parameter in model.parameters())


def trunk(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder below the output head, which maps ids to last hidden states."""
    return getattr(model, model.base_model_prefix)


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """What maps last hidden states to logits: the output embeddings, and what the model's config says is done to their
    product."""
    head, config = model.get_output_embeddings(), model.config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return head if scale == 1 and cap is None else ScaledHead(head, scale, cap)


class ScaledHead(torch.nn.Module):
    """An output head whose logits are scaled (Cohere, Granite) or capped to ``cap tanh(logit / cap)`` (Gemma 2)."""

    def __init__(self, head: torch.nn.Module, scale: float, cap: float | None):
        super().__init__()
        self.head, self.scale, self.cap = head, scale, cap

    @property
    def weight(self) -> torch.Tensor:
        return self.head.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden) * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits over the names, shapes and a sample of values of a model's weights, adapters left out."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name and "lora_magnitude" not in name:
            flat = sharding.values(parameter).reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            plain = name.replace(".base_layer", "").removeprefix("base_model.model.")
            digest.update(f"{plain}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def num_embeddings(model: PreTrainedModel) -> int:
    """Number of token ids that a model knows."""
    return model.get_input_embeddings().num_embeddings


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Check that a model can be trained with a tokenizer. It needs no padding token: padding is told by lengths here.

    Raises:
        ValueError: it has no end-of-sequence token, so no response could end; or it has ids that the model has no
            embedding for. Special tokens may lie beyond (Gemma 3 has one for images, which no text becomes).
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: it has no end-of-sequence token, so no response could end; set tokenizer.eos_token"
        )
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.eos_token_id}
    highest, rows = max(set(tokenizer.get_vocab().values()) - special), num_embeddings(model)
    if highest >= rows:
        raise ValueError(
            f"tokenizer: its ids go up to {highest}, the model has embeddings for {rows} tokens; take the model's own"
            " tokenizer, or model.resize_token_embeddings(...)"
        )
