"""Building, saving and loading the models: from-scratch rungs, their tokenizer, LoRA adapters on one shared base.

Every folder written here is a plain transformers or PEFT folder (safetensors and JSON).
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from rlhfscale import tasks
from rlhfscale.ladder import BOS_ID, SPECIAL_TOKENS, Rung

logging.disable_progress_bar()  # of loading and saving weights: noise in a worker's log

POLICY, CRITIC, REWARD = "policy", "critic", "reward"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The from-scratch rungs' tokenizer: one token for each whitespace-separated symbol of the task universe.

    Encoding adds the begin-of-sequence token; text with an unknown symbol must not be given to it: there
    is no unknown token to stand for it, and it would become padding (`data.demonstrations.encode` raises instead).
    """
    pad, bos, eos = SPECIAL_TOKENS
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *tasks.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def build_rung(rung: Rung, seed: int) -> LlamaForCausalLM:
    """A freshly initialised float32 model of a rung; the global torch RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**rung.llama()))


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write model and tokenizer as one transformers folder."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


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


def lora_config(rank: int, alpha: float) -> LoraConfig:
    """LoRA on every linear layer of the decoder blocks (Hu et al. 2021; Schulman et al. 2025 find all layers best)."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")


class ValueHead(nn.Module):
    """A linear read-out of the trunk's last hidden state, starting at zero: float32 [..., width] -> [...]."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden).squeeze(-1)


class SharedBase(nn.Module):
    """One frozen base that carries the adapters ``policy`` and ``critic``; with adapters off it is the reference.

    Args:
        base: a causal language model; its weights are frozen in place.
        rank: LoRA rank of both adapters.
        alpha: LoRA scale numerator.
        seed: seed of the adapters' initialisation (their product starts at zero either way).
    """

    def __init__(self, base: PreTrainedModel, *, rank: int, alpha: float, seed: int):
        super().__init__()
        self._decoder = copy.deepcopy(base).eval().requires_grad_(False)
        config = lora_config(rank, alpha)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = get_peft_model(base, config, adapter_name=POLICY)
            self.model.add_adapter(CRITIC, config)
        self.value_head = ValueHead(base.config.hidden_size)
        self.use(POLICY)

    def use(self, adapter: str) -> None:
        """Make an adapter the active and the trainable one."""
        self.model.set_adapter(adapter)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within this context the model is the reference policy: the base alone, no gradient."""
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states under the active adapter: float32 [batch, length, width]."""
        return self.trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    @property
    def trunk(self) -> nn.Module:
        return self.model.base_model.model.model

    @property
    def output_head(self) -> nn.Module:
        return self.model.base_model.model.lm_head

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """The trainable parameters of an adapter, with the value head for the critic."""
        marker = f".{adapter}."
        found = [parameter for name, parameter in self.model.named_parameters() if marker in name]
        return found + list(self.value_head.parameters()) if adapter == CRITIC else found

    @torch.no_grad()
    def merged_policy(self) -> PreTrainedModel:
        """A plain copy of the model with the policy adapter folded into its weights, for decoding.

        A folded decoding step runs no adapter products. The copy is refreshed in place at each call, from the frozen
        base, so no rounding error builds up.
        """
        weights = dict(self._decoder.named_parameters())
        for name, module in self.model.base_model.model.named_modules():
            if hasattr(module, "get_delta_weight"):
                weights[f"{name}.weight"].copy_(module.base_layer.weight + module.get_delta_weight(POLICY))
        return self._decoder

    def save_adapter(self, adapter: str, folder: Path) -> None:
        """Write one adapter as a plain PEFT folder ``folder/<adapter>``."""
        # no embedding is adapted; "auto", the default, may look the base's name up on the hub to find that out
        self.model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
