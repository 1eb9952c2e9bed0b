"""What reward models have in common: reading a score head at chosen tokens, training it, saving and loading."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhfscale.models import llama, lm, loading, packing, parallel, sharding
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards.base import Normalised, moments
from rlhfscale.rewards.conversations import OwnTokens

TOKENS_PER_MICRO_BATCH = 16384
Batch = TypeVar("Batch")
Scored = PreTrainedModel | PeftModel


def trunk_and_head(model: Scored) -> tuple[nn.Module, nn.Module]:
    """The decoder and the linear head ``score`` of a sequence-classification model, with adapters or without.

    Raises:
        ValueError: it has no such head, or not exactly one output.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk, head = getattr(plain, plain.base_model_prefix, None), getattr(plain, "score", None)
    if trunk is None or head is None:
        raise ValueError(f"{type(plain).__name__} has no decoder with a head `score`; load a sequence classifier")
    if plain.config.num_labels != 1:
        raise ValueError(f"the model has {plain.config.num_labels} outputs; load it with num_labels=1")
    return trunk, head


def _ready(model: Scored) -> Scored:
    """The model with its head in float32, whatever the trunk's precision, and gradients that are right in 4 bits.

    Raises ValueError for the base of a PeftModel, which would be scored with the adapters put into it.
    """
    trunk_and_head(model)[1].float()
    if not isinstance(model, PeftModel) and hasattr(model, "peft_config"):
        raise ValueError("model: it carries the adapters of another model already; load a base of its own")
    return loading.close_nf4_trap(model)


def at_least_one(**values: int) -> None:
    """Raise ValueError that names the first of the values below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: {value} is below 1")


def micro_batches(sequences: Sequences, tokens: int) -> Iterator[np.ndarray]:
    """Indices of sequences to be computed together (see `packing.cut`).

    Where many prompts are equal, all responses to a prompt stay together, so that `packing` can compute it once.
    """
    prompt = np.arange(sequences.ids.shape[1]) < sequences.prompt_lengths[:, None]
    _, first, group = np.unique(np.where(prompt, sequences.ids, -1), axis=0, return_index=True, return_inverse=True)
    group, widths = group.reshape(-1), sequences.prompt_lengths[first]
    np.add.at(widths, group, sequences.lengths - sequences.prompt_lengths)
    if widths.sum() > (1 - packing.LEAST_SAVING) * sequences.lengths.sum():
        group, widths = np.arange(len(sequences)), sequences.lengths
    members = np.split(np.argsort(group, kind="stable"), np.bincount(group).cumsum()[:-1])
    for batch in packing.cut(widths, tokens):
        yield np.concatenate([members[index] for index in batch])


def read(model: Scored, sequences: Sequences, where: np.ndarray, tokens: int) -> torch.Tensor:
    """A sequence classifier's score head at chosen positions; see `read_head`."""
    trunk, head = trunk_and_head(model)
    adapted = isinstance(model, PeftModel)
    # scores of a model with adapters are PEFT's own, to the bit
    fused = None if adapted and not torch.is_grad_enabled() else llama.form_of(model)

    def states(ids, where, prompt_lengths, lengths) -> torch.Tensor:
        if fused:
            return fused.hidden_at(ids, where, model.active_adapter if adapted else None, lengths, prompt_lengths)
        return trunk(input_ids=ids, use_cache=False).last_hidden_state[where]

    return read_head(states, head, sequences, where, tokens)


def read_head(
    states: Callable[..., torch.Tensor],
    head: nn.Module,
    sequences: Sequences,
    where: np.ndarray,
    tokens: int,
) -> torch.Tensor:
    """A score head at chosen positions, differentiable.

    No attention mask is needed: sequences are padded on the right and attention is causal, so no token of a sequence
    sees padding, whatever the padding token is. The head runs on the chosen positions only.

    Args:
        states: ids, chosen tokens (int64 and bool [sequence, length]), prompt lengths and lengths (int64 [sequence]) to
            last hidden states [position, width].
        where: bool [sequence, length], tokens within the sequences.
        tokens: of a micro-batch, padding included. The result and its gradient do not depend on it.

    Returns:
        float32 [position], row by row.
    """
    device = next(head.parameters()).device
    number = where.cumsum().reshape(where.shape) - 1
    scores, numbers = [], []
    # every process computes its share of the same parts, as a sharded model needs (see `sharding`)
    for rows in micro_batches(sequences, tokens * parallel.size()):
        width = int(sequences.lengths[rows].max())
        scores.append(_of_all(states, head, sequences[rows], where[rows, :width]))
        numbers.append(number[rows, :width][where[rows, :width]])
    back = torch.from_numpy(np.argsort(np.concatenate(numbers)))
    return torch.cat(scores)[back.to(device)]


def _of_all(states, head: nn.Module, sequences: Sequences, where: np.ndarray) -> torch.Tensor:
    """float32 [position] of sequences that are computed together: this process's share of them, joined with what the
    other processes found."""
    if parallel.size() == 1:
        return _read_own(states, head, sequences, where)
    rows = parallel.own(len(sequences)).numpy()
    read = _read_own(states, head, sequences[rows], where[rows])
    own, every = (torch.from_numpy(x).to(read.device) for x in (where[rows], where))
    laid_out = read.new_zeros(own.shape).masked_scatter(own, read)
    return parallel.whole(laid_out, torch.from_numpy(rows), len(where))[every]


def _read_own(states, head: nn.Module, sequences: Sequences, where: np.ndarray) -> torch.Tensor:
    parameter = next(head.parameters())
    width = int(sequences.lengths.max())
    ids = np.where(np.arange(width) < sequences.lengths[:, None], sequences.ids[:, :width], 0)
    given = ids, where[:, :width], sequences.prompt_lengths, sequences.lengths
    found = states(*(torch.from_numpy(x).to(parameter.device) for x in given))
    return head(found.to(parameter.device, parameter.dtype)).squeeze(-1).float()


def distinct(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ, so that equal sequences are computed once: responses to one prompt often repeat.

    Returns:
        int64 [distinct], the first row of each kind; and int64 [row], which of them each row equals.
    """
    rows = np.column_stack([sequences.ids, sequences.lengths, sequences.prompt_lengths])
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def prepare(model: Scored, lora_rank: int, merge: bool, rng: np.random.Generator) -> Scored:
    """The model made ready for training: score head in float32, and adapters of that rank unless it is 0.

    A model that has adapters keeps and trains those.

    Raises:
        ValueError: the model's adapters have another rank; or all weights of a quantised model would be trained, or
            adapters folded into them.
    """
    _ready(model)
    if merge:
        _check_merge(model)
    if isinstance(model, PeftModel):
        rank = model.active_peft_config.r
        if rank != lora_rank:
            raise ValueError(f"lora_rank: {lora_rank}, but the model has adapters of rank {rank}")
        model.set_adapter(model.active_adapter)
    elif lora_rank:
        config = loading.lora_config(lora_rank, 2.0 * lora_rank)
        config.modules_to_save = ["score"]
        with torch.random.fork_rng(), loading.quiet_peft():
            torch.manual_seed(int(rng.integers(2**31)))
            model = get_peft_model(model, config)
    elif loading.is_quantised(model):
        raise ValueError("lora_rank: 0, but a quantised model cannot be trained without adapters")
    elif sharding.is_sharded(model):
        raise ValueError("lora_rank: 0, but a sharded model cannot be trained without adapters")
    else:
        model.requires_grad_(True)
    return model.train()


def optimizers(model: Scored, lr: float, muon_lr: float | None) -> list[torch.optim.Optimizer]:
    """AdamW for adapters and their head; without adapters Muon for the matrices and AdamW for the rest."""
    if isinstance(model, PeftModel):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    if muon_lr is None:
        raise ValueError("muon_lr: needed where all weights are trained (lora_rank=0)")
    return lm.optimizers(model, lr, muon_lr)


def fit(
    model: Scored,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], tuple[torch.Tensor, dict[str, float]]],
    chosen: Sequence[torch.optim.Optimizer],
) -> list[dict[str, float]]:
    """One optimiser step for each batch, with warm-up, decay and gradients clipped to norm 1.

    Args:
        model: in training mode.
        loss_of: a batch's loss and what else to record of it.
        chosen: the optimisers.

    Returns:
        one record of step, loss and the rest for each step.

    Raises:
        lm.Diverged: the loss or its gradient is not finite.
    """
    groups = [group for optimizer in chosen for group in optimizer.param_groups]
    base_rates = [group["lr"] for group in groups]
    records = []
    for step, batch in enumerate(batches):
        factor = lm.warmup_stable_decay(step, len(batches), warmup=20)
        for group, rate in zip(groups, base_rates, strict=True):
            group["lr"] = factor * rate
        loss, record = loss_of(batch)
        if not torch.isfinite(loss):
            raise lm.Diverged(f"step {step}: reward-model loss is {loss.item()}; lower the learning rate")
        model.zero_grad(set_to_none=True)
        loss.backward()
        parallel.sum_gradients(model.parameters())
        norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        if not torch.isfinite(norm):
            raise lm.Diverged(f"step {step}: reward-model gradient norm is {norm.item()}; lower the learning rate")
        for optimizer in chosen:
            optimizer.step()
        # the fused optimiser does not, and the fused trunk's merged weights go by it
        torch.autograd.graph.increment_version([p for p in model.parameters() if p.requires_grad])
        records.append({"step": step, "loss": loss.item()} | record)
    return records


def _check_merge(model: Scored) -> None:
    if loading.is_quantised(model):
        raise ValueError("merge: adapters folded into quantised weights are rounded away; give merge=False")
    if sharding.is_sharded(model):
        raise ValueError("merge: no process holds all weights of a sharded model; give merge=False")


def finish(model: Scored, merge: bool) -> Scored:
    """The trained model in evaluation mode, its adapters folded in if ``merge``."""
    return (model.merge_and_unload() if merge and isinstance(model, PeftModel) else model).eval()


class Scorer:
    """A frozen sequence-classification model and its tokenizer: the base of the reward models.

    Attributes:
        model: frozen in place, its score head in float32.
        tokenizer: of the model; None takes any sequence's ids for its own.
        own: turns sequences into those of this tokenizer, see `conversations.OwnTokens`.
        mean, std: of the scores over reference responses, see `calibrate` and `normalised`.
    """

    _options: ClassVar[tuple[str, ...]]
    """Arguments of the constructor that a saved folder records."""

    def __init__(
        self,
        model: Scored,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        tokens_per_micro_batch: int = TOKENS_PER_MICRO_BATCH,
    ):
        at_least_one(tokens_per_micro_batch=tokens_per_micro_batch)
        self.model, self.tokenizer = _ready(model).eval().requires_grad_(False), tokenizer
        self.mean, self.std = moments(mean, std)
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self.own = OwnTokens(tokenizer)

    def score(self, sequences: Sequences) -> np.ndarray:
        raise NotImplementedError

    def calibrate(self, scores: np.ndarray) -> None:
        """Set the mean and standard deviation that `normalised` removes from raw scores of reference responses.

        Raises ValueError where all scores are equal: such a model says nothing.
        """
        self.mean, self.std = moments(float(scores.mean()), float(scores.std()))

    def normalised(self) -> Normalised:
        """This reward with mean 0 and standard deviation 1 over the responses it was calibrated on."""
        return Normalised(self, self.mean, self.std)

    def save(self, folder: str | Path, *, merge: bool = False) -> None:
        """Write a plain sequence-classification folder, or a plain PEFT folder if the model has adapters, with the
        tokenizer and ``reward.json``: the options, mean, std.

        Args:
            merge: fold adapters into a copy of the weights, rounding to their precision, and write a
                sequence-classification folder. Raises ValueError for a quantised model.
        """
        folder, model = Path(folder), self.model
        if merge and isinstance(model, PeftModel):
            _check_merge(model)
            model = finish(copy.deepcopy(model), merge)
        if isinstance(model, PeftModel):
            _save_adapter(model, folder)
        elif sharding.is_sharded(model):
            raise ValueError("model: no process holds all weights of a sharded model; only adapters on it are saved")
        else:
            model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        about = {name: getattr(self, name) for name in (*self._options, "mean", "std")}
        (folder / "reward.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel | None = None) -> Self:
        """Load what `save` wrote.

        Args:
            model: the sequence-classification model if it is loaded already, e.g. in another precision; for a folder
                of adapters their base, changed in place, so of no other reward model. Unless given, it is loaded in
                float32 from the folder, for adapters from the folder of their base that they record.

        Raises:
            ValueError: the folder holds no reward model, or one of another kind; or the adapters' base is not found.
        """
        folder = Path(folder)
        about, tokenizer = saved(folder)
        if about.keys() != {*cls._options, "mean", "std"}:
            raise ValueError(f"{folder} holds no {cls.__name__}; make one of a bare model by {cls.__name__}(...)")
        return cls(_load_model(folder, model), tokenizer, **about)


def saved(folder: Path) -> tuple[dict[str, Any], PreTrainedTokenizerBase | None]:
    """What `Scorer.save` wrote beside the model: options, mean and std (empty if it did not), and the tokenizer."""
    about = json.loads((folder / "reward.json").read_text()) if (folder / "reward.json").exists() else {}
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    return about, AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None


def _save_adapter(model: PeftModel, folder: Path) -> None:
    """The active adapter with its head into the folder itself; PEFT puts all names but "default" one deeper."""
    name = model.active_adapter
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    if name != "default":
        for file in (folder / name).iterdir():
            file.replace(folder / file.name)
        (folder / name).rmdir()


def _load_model(folder: Path, model: PreTrainedModel | None) -> Scored:
    if not (folder / "adapter_config.json").exists():
        return loading.load_scorer(folder) if model is None else model
    if model is None:
        base = Path(PeftConfig.from_pretrained(folder).base_model_name_or_path or "")
        if not (base / "config.json").exists():
            raise ValueError(f"{folder} holds adapters, but no base is at {str(base)!r}; give load(folder, model=base)")
        with torch.random.fork_rng():  # the base's own head is random where it is a language model
            model = loading.load_scorer(base)
    return PeftModel.from_pretrained(_ready(model), folder)  # a head of the base's precision would round the saved one
