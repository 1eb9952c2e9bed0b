"""A reward model as one more adapter on the base that policy, reference and critic share."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn

from rlhfscale.models.loading import REWARD
from rlhfscale.models.sequences import Conversation, Sequences
from rlhfscale.rewards import scorer
from rlhfscale.rewards.base import moments
from rlhfscale.rewards.conversations import OwnTokens
from rlhfscale.rewards.outcome import by_sequence, read_at


class SharedReward:
    """An outcome reward model whose adapter was trained on the policy's own base.

    A trainer puts the adapter on that base, so the reward model needs only the memory of its adapter. Its scores equal
    those of `OutcomeRewardModel.load`.

    Args:
        folder: a folder that `OutcomeRewardModel.save` wrote for a model with adapters.
        tokens_per_micro_batch: tokens computed together, padding included; changes the speed only.

    Attributes:
        mean, std: mean and standard deviation of the scores over reference responses, as saved.

    Raises:
        ValueError: the folder holds no outcome reward model, or one without adapters.
    """

    def __init__(self, folder: str | Path, *, tokens_per_micro_batch: int = scorer.TOKENS_PER_MICRO_BATCH):
        self.folder = folder = Path(folder)
        about, self.tokenizer = scorer.saved(folder)
        if "readout" not in about or not (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} holds no outcome reward model with adapters (trained with merge=False)")
        self.own, self.readout = OwnTokens(self.tokenizer), about["readout"]
        self.mean, self.std = moments(about["mean"], about["std"])
        self.tokens_per_micro_batch = tokens_per_micro_batch
        self._networks: Any = None

    def attach(self, networks: Any) -> None:
        """Put adapter and head on the base of the networks.

        Raises:
            ValueError: all weights are trained, so there is no frozen base; the base has another shape than the one
                the adapter was trained on; or it carries another reward's adapter.
        """
        if not hasattr(networks, "add_frozen"):
            raise ValueError("adapter: none moves the base under the reward's adapter; take OutcomeRewardModel.load")
        weights = load_file(self.folder / "adapter_model.safetensors")
        (head_name,) = (name for name in weights if name.endswith("score.weight"))
        head = weights.pop(head_name).float()
        config = PeftConfig.from_pretrained(self.folder)
        config.modules_to_save, config.task_type = None, None
        networks.add_frozen(REWARD, config, weights, self.folder)
        self._head = nn.Linear(head.shape[1], 1, bias=False, device=networks.base.device).requires_grad_(False)
        self._head.weight.copy_(head)
        self._networks = networks

    @torch.no_grad()
    def score(self, sequences: Sequences) -> np.ndarray:
        """Raw scores, float32 [sequence]; equal sequences are computed once.

        Raises:
            ValueError: an empty response, or sequences of another tokenizer.
            RuntimeError: the reward is not part of a trainer yet.
        """
        if self._networks is None:
            raise RuntimeError("SharedReward: give it to a trainer first, whose base it is read on")
        both = None not in (self.tokenizer, sequences.tokenizer)
        if both and not self.own.same(sequences.tokenizer):
            raise ValueError(f"{self.folder}: its tokenizer is not the policy's; take OutcomeRewardModel.load")
        sequences = self.own(sequences)
        first, inverse = scorer.distinct(sequences)
        where = read_at(sequences[first], self.readout)
        read = scorer.read_head(self._states, self._head, sequences[first], where, self.tokens_per_micro_batch)
        return by_sequence(read, where).cpu().numpy()[inverse]

    def calibrate(self, scores: np.ndarray) -> None:
        """Set the mean and standard deviation of raw scores over reference responses, here and in the folder.

        Raises ValueError where all scores are equal, because such a model tells no response from another.
        """
        self.mean, self.std = moments(float(scores.mean()), float(scores.std()))
        about, _ = scorer.saved(self.folder)
        about |= {"mean": self.mean, "std": self.std}
        (self.folder / "reward.json").write_text(json.dumps(about))

    def _states(self, ids, where, prompt_lengths, lengths) -> torch.Tensor:
        return self._networks.hidden_at(ids, where, REWARD, prompt_lengths, lengths)


def attach(reward: Any, networks: Any) -> None:
    """Put every `SharedReward` that a reward consists of on the base of the networks."""
    for part in _parts(reward):
        if isinstance(part, SharedReward):
            part.attach(networks)


def check_conversations(reward: Any, conversations: Sequence[Conversation]) -> None:
    """Raise ValueError for a conversation that the chat template of a part of the reward refuses."""
    for part in _parts(reward):
        if isinstance(own := getattr(part, "own", None), OwnTokens):
            own.check(conversations)


def _parts(reward: Any) -> Iterator[Any]:
    """The reward and all that it consists of."""
    yield reward
    members = [getattr(reward, "reward", None), *getattr(reward, "rewards", [])]
    for member in members + [part for _, part in getattr(reward, "parts", [])]:
        if member is not None:
            yield from _parts(member)
