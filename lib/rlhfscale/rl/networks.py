"""Policy, reference and critic as one object, from one base model.

`SharedBase` freezes the base and gives it LoRA adapters: the reference policy is the base with its adapters off, so
four models cost the memory of one. `FullWeights` trains all weights and keeps a frozen copy as the reference.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from rlhfscale.models import allocator, llama, loading, lora, recomputation, sharding
from rlhfscale.models.loading import CRITIC, POLICY

REFERENCE = "reference"
CRITICS = ("trunk", "separate", "none")
VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """A linear read-out of the trunk's last hidden state, starting at zero: [..., width] -> float32 [...]."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, width, 1)  # drawing nothing from torch's global generator
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1)


def build(
    base: PreTrainedModel,
    *,
    adapter: str = "lora",
    critic: str = "trunk",
    rank: int = 16,
    alpha: float = 32.0,
    targets: str | list[str] = "all-linear",
    gradient_checkpointing: bool = False,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> "SharedBase | FullWeights":
    """The networks of a run.

    Args:
        base: a causal language model in float32, bfloat16 or 4 bits, sharded or whole; changed in place.
        adapter: "lora", or "none" to train all weights.
        critic: where values are read: "trunk", a head on the policy's own trunk (one pass serves both); "separate", an
            adapter or a copy of its own; "none", no critic.
        rank, alpha, targets: of the LoRA adapters.
        gradient_checkpointing: keep only each block's input and compute it again in the backward pass.
        compute_dtype: bfloat16 to compute the layers of a float32 model in (weights, adapters, head and losses stay
            float32); a Llama on a CPU only.
        seed: of the adapters' initialisation.

    Raises:
        ValueError: an unknown choice; a 4-bit or sharded base with adapter "none"; targets that match no module; an
            output head whose logits the model transforms further.
    """
    if critic not in CRITICS:
        raise ValueError(f"critic: {critic!r} is not one of {', '.join(CRITICS)}")
    if adapter not in ("lora", "none"):
        raise ValueError(f"adapter: {adapter!r} is not one of lora, none")
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):  # a PeftModel, or the base of one
        raise ValueError(
            "model: it already carries an adapter; pass trainer.release(), the base, if a trainer put it there, else"
            " model.unload() or model.merge_and_unload()"
        )
    loading.close_nf4_trap(base)
    if base.device.type == "cpu":
        allocator.keep_freed_memory()
    if adapter == "none" and loading.is_quantised(base):
        raise ValueError("adapter: none trains all weights, which a 4-bit base cannot; use adapter: lora")
    if adapter == "none" and sharding.is_sharded(base):
        raise ValueError("adapter: none trains all weights, of which a sharded base holds a part; use adapter: lora")
    check_output_head(base.eval())
    if adapter == "none":
        networks = FullWeights(base, critic=critic)
    else:
        adapters = {"rank": rank, "alpha": alpha, "targets": targets, "seed": seed}
        networks = SharedBase(base, critic=critic, compute_dtype=compute_dtype, **adapters)
    if gradient_checkpointing:
        networks.checkpoint_blocks()
    return networks


@torch.no_grad()
def check_output_head(model: PreTrainedModel) -> None:
    """Raise ValueError unless the logits are the output head's product with the trunk's last hidden state.

    Log-probabilities are computed from the two, so that logits of all positions never exist. A model that changes its
    logits in a way that `loading.output_head` does not know would be trained on others than it samples from.
    """
    ids = torch.tensor([[0, 1, 2]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    ours = loading.output_head(model)(loading.trunk(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits.float(), ours.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the output head, which is unsupported"
        )


@dataclass(frozen=True)
class Decodable:
    """What a sampler needs of the policy where that is not a transformers model of its own.

    Attributes:
        config, generation_config: the model's.
        device: where it is.
        decoder: makes a decoder (see `samplers.hf`) for a number of positions.
    """

    config: Any
    generation_config: Any
    device: torch.device
    decoder: Callable[[int], Any]


def last_hidden(trunk: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states [sequence, length, width] of ids padded on the right.

    No attention mask is needed: attention is causal, so no token sees the padding behind it.
    """
    return trunk(input_ids=ids, use_cache=False).last_hidden_state


class SharedBase(nn.Module):
    """One frozen base that carries the adapters ``policy`` and, with a separate critic, ``critic``.

    Attributes:
        model: the PeftModel; its plain forward pass is PEFT's own.
        trained: names of the adapters that are trained and saved.
        value_head: reads values, or None without a critic.
    """

    def __init__(
        self, base: PreTrainedModel, *, critic: str, rank: int, alpha: float, targets, seed: int, compute_dtype
    ):
        super().__init__()
        self.fingerprint = loading.fingerprint(base)
        config = loading.lora_config(rank, alpha, targets)
        base.requires_grad_(False)
        with torch.random.fork_rng(), loading.quiet_peft():
            torch.manual_seed(seed)
            self.model = get_peft_model(base, config, adapter_name=POLICY)
            if critic == "separate":
                self.model.add_adapter(CRITIC, config)
        if isinstance(base.get_output_embeddings(), BaseTunerLayer):
            self.release()
            raise ValueError("lora_targets: the output head is shared with the reference and cannot be adapted")
        self.trained = list(self.model.peft_config)
        self._require_gradients()
        self.critic = critic
        self.value_head = None if critic == "none" else ValueHead(base.config.hidden_size).to(base.device)
        # in this order: the layers' weights are moved together first, and only then looked at by each layer
        self._fused = llama.fused(loading.trunk(base), base.get_output_embeddings(), compute_dtype)
        if compute_dtype is not None and self._fused is None:
            warnings.warn(
                f"compute_dtype: {type(base).__name__} on {base.device.type} computes in its own {base.dtype}; this"
                " setting is for Llama, Mistral and Qwen2 on a CPU. Elsewhere load the model in bf16",
                stacklevel=4,
            )
        self.switch = lora.install(self.model)

    @property
    def base(self) -> PreTrainedModel:
        return self.model.base_model.model

    def output_head(self, role: str) -> nn.Module:
        """The head that maps hidden states to logits."""
        return loading.output_head(self.base)

    def hidden(self, ids: torch.Tensor, role: str) -> torch.Tensor:
        """Last hidden states [sequence, length, width] of ids padded on the right, int64 [sequence, length].

        Args:
            role: ``policy``, ``critic``, ``reference``, or the name of a frozen adapter.
        """
        name = None if role == REFERENCE else role
        if self._fused:
            return self._fused.hidden(ids, name)
        with lora.adapter(self.switch, name):
            return last_hidden(loading.trunk(self.base), ids)

    def hidden_at(
        self,
        ids: torch.Tensor,
        where: torch.Tensor,
        role: str,
        prompt_lengths: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The states [position, width] at the tokens ``where`` (bool [sequence, length]), sequence by sequence; what
        they do not need is not computed where that can be helped."""
        if self._fused:
            return self._fused.hidden_at(ids, where, None if role == REFERENCE else role, lengths, prompt_lengths)
        return self.hidden(ids, role)[where]

    def checkpoint_blocks(self) -> None:
        """Keep only each block's input for the backward pass, and compute the rest again there."""
        if self._fused:
            self._fused.checkpointing = True
        else:
            recomputation.of_blocks(self.base, self.switch)

    def _require_gradients(self) -> None:
        """Of policy and critic at once: which of them gets one is decided by what was computed."""
        names = tuple(f".{name}.weight" for name in self.trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name and name.endswith(names))

    def add_frozen(self, name: str, config: LoraConfig, weights: dict[str, torch.Tensor], source: Path) -> None:
        """Put a further adapter on the base, not to be trained or saved, as a role for `hidden`.

        Raises ValueError, naming ``source``, where the base is not of the adapter's shape or carries that name already.
        """
        if name in self.model.peft_config:
            raise ValueError(f"{source}: the base carries an adapter {name!r} already")
        self.model.add_adapter(name, config)
        own = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
        if {key: tensor.shape for key, tensor in own.items()} != {key: w.shape for key, w in weights.items()}:
            self.model.delete_adapter(name)
            raise ValueError(f"{source}: its adapter belongs to a base of another shape than the policy's")
        set_peft_model_state_dict(self.model, weights, adapter_name=name)
        self._require_gradients()

    @property
    def critic_role(self) -> str:
        return CRITIC if self.critic == "separate" else POLICY

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """The trainable parameters of the policy, or of the critic with its value head."""
        found = [parameter for name, parameter in self.model.named_parameters() if f".{role}." in name]
        return found + (list(self.value_head.parameters()) if role == CRITIC and self.value_head else [])

    @contextlib.contextmanager
    def decoder(self) -> Iterator[PreTrainedModel | Decodable]:
        """Within this context: what a sampler decodes the policy with."""
        if self._fused:
            make = partial(self._fused.decoder, POLICY)
            yield Decodable(self.base.config, self.base.generation_config, self.base.device, make)
        else:
            with lora.adapter(self.switch, POLICY):
                yield self.base

    @torch.no_grad()
    def merged_policy(self) -> PreTrainedModel:
        """A plain copy of the base with the policy adapter folded into its weights. Raises ValueError for a sharded
        base."""
        if sharding.is_sharded(self.base):
            raise ValueError("the base is sharded: save the adapter, and merge it into a base that is not")
        return copy.deepcopy(self.model).merge_and_unload(adapter_names=[POLICY]).eval()

    def release(self) -> PreTrainedModel:
        """Take all adapters off the base and return it; these networks cannot be used any more."""
        base = self.model.unload()
        recomputation.undo(base)
        return base

    @contextlib.contextmanager
    def as_peft(self, role: str) -> Iterator[PeftModel]:
        """Within this context: the PeftModel with that adapter active, computed by PEFT alone."""
        self.model.set_adapter(role)
        try:
            yield self.model
        finally:
            self._require_gradients()

    def save(self, folder: Path) -> None:
        """Write ``folder/policy`` and, if separate, ``folder/critic`` as plain PEFT folders, and the value head."""
        # no embedding is adapted; "auto", the default, may look the base's name up on the hub to find that out
        self.model.save_pretrained(folder, selected_adapters=self.trained, save_embedding_layers=False)
        _save_head(self.value_head, folder)

    def save_adapter(self, name: str, folder: Path) -> None:
        """Write ``folder/name``, that adapter alone, as a plain PEFT folder."""
        self.model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, into these networks."""
        for adapter in self.trained:
            weights = load_file(folder / adapter / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model, weights, adapter_name=adapter)
        _load_head(self.value_head, folder)


class FullWeights(nn.Module):
    """A policy of which every weight is trained, a frozen copy as the reference, and a copy of the trunk as a separate
    critic. Same methods as `SharedBase`."""

    def __init__(self, base: PreTrainedModel, *, critic: str):
        super().__init__()
        self.fingerprint = loading.fingerprint(base)
        self.reference = copy.deepcopy(base).requires_grad_(False)
        self.critic_trunk = copy.deepcopy(loading.trunk(base)).requires_grad_(True) if critic == "separate" else None
        self.base = base.requires_grad_(True)
        self.critic = critic
        self.value_head = None if critic == "none" else ValueHead(base.config.hidden_size).to(base.device)

    def output_head(self, role: str) -> nn.Module:
        return loading.output_head(self.reference if role == REFERENCE else self.base)

    def hidden(self, ids: torch.Tensor, role: str) -> torch.Tensor:
        trunks = {POLICY: loading.trunk(self.base), CRITIC: self.critic_trunk, REFERENCE: loading.trunk(self.reference)}
        return last_hidden(trunks[role], ids)

    def hidden_at(self, ids, where, role: str, prompt_lengths, lengths) -> torch.Tensor:
        return self.hidden(ids, role)[where]

    def checkpoint_blocks(self) -> None:
        for model in (self.base, self.critic_trunk):
            if model is not None:
                recomputation.of_blocks(model)

    @property
    def critic_role(self) -> str:
        return CRITIC if self.critic == "separate" else POLICY

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        if role == POLICY:
            return list(self.base.parameters())
        return [p for module in (self.critic_trunk, self.value_head) if module for p in module.parameters()]

    @contextlib.contextmanager
    def decoder(self) -> Iterator[PreTrainedModel]:
        yield self.base

    def merged_policy(self) -> PreTrainedModel:
        return self.base

    def release(self) -> PreTrainedModel:
        """The trained model itself, its weights as they are now."""
        recomputation.undo(self.base)
        return self.base

    def save(self, folder: Path) -> None:
        """Write ``folder/policy`` as a transformers folder, ``critic.safetensors`` if separate, and the value head."""
        self.base.save_pretrained(folder / POLICY)
        if self.critic_trunk:
            save_file({name: p.detach().contiguous() for name, p in self.critic_trunk.named_parameters()},
                      folder / "critic.safetensors")  # fmt: skip
        _save_head(self.value_head, folder)

    def load(self, folder: Path) -> None:
        saved = type(self.base).from_pretrained(folder / POLICY, dtype=self.base.dtype)
        self.base.load_state_dict(saved.state_dict())
        if self.critic_trunk:
            self.critic_trunk.load_state_dict(load_file(folder / "critic.safetensors"), strict=False)
        _load_head(self.value_head, folder)


def _save_head(head: ValueHead | None, folder: Path) -> None:
    if head:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in head.state_dict().items()}, folder / VALUE_HEAD
        )


def _load_head(head: ValueHead | None, folder: Path) -> None:
    if head:
        head.load_state_dict(load_file(folder / VALUE_HEAD))
