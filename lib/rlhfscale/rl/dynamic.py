"""Dynamic sampling (Yu et al. 2025, DAPO, section 3.2): a group whose responses all earned the same teaches nothing,
and is replaced by the responses to another prompt."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch

from rlhfscale.rl.rollout import Prompt, Rollouts
from rlhfscale.samplers.base import Completions

Batch = tuple[Rollouts, Completions]


class NoSignal(RuntimeError):
    """No group had responses of unequal reward, however many prompts were tried."""


def differing(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """bool [group]: whether a group's scores, float32 [batch], are not all the same."""
    groups = scores.view(-1, group_size)
    return groups.amax(1) > groups.amin(1)


def replaced(
    first: Batch,
    collect: Callable[[Sequence[Prompt], int], Batch],
    more: Callable[[int], Sequence[Prompt]],
    *,
    group_size: int,
    rounds: int,
) -> tuple[Batch, int]:
    """An update's responses with the groups that teach nothing replaced.

    Args:
        first: the responses to the update's own prompts.
        collect: samples and scores responses to prompts, in a round from 1.
        more: draws a number of further prompts.
        group_size: responses to each prompt.
        rounds: how often further prompts are tried. Groups that are still missing then are filled up with ones that
            teach nothing, so that the number of roll-outs stays.

    Returns:
        as many roll-outs and responses as in ``first``, and the number of groups that were replaced.

    Raises:
        NoSignal: no group is left that teaches anything.
    """
    wanted = len(first[0]) // group_size
    useful = differing(first[0].scores, group_size)
    parts = [_groups(first, useful.nonzero()[:, 0], group_size)]
    found = int(useful.sum())
    for number in range(1, rounds + 1):
        if found == wanted:
            break
        batch = collect(more(wanted - found), number)
        index = differing(batch[0].scores, group_size).nonzero()[:, 0]
        parts.append(_groups(batch, index, group_size))
        found += len(index)
    if not found:
        raise NoSignal(
            f"dynamic_sampling: in {rounds} further rounds no prompt had responses of unequal reward; take more"
            " responses to each prompt, other prompts, or a reward that tells them apart"
        )
    rest = (~useful).nonzero()[: wanted - found, 0]
    parts.append(_groups(first, rest, group_size))
    return concatenated([part for part in parts if len(part[0])]), int((~useful).sum()) - len(rest)


def _groups(batch: Batch, index: torch.Tensor, group_size: int) -> Batch:
    """Some groups of a batch."""
    rows = (index[:, None] * group_size + torch.arange(group_size, device=index.device)).flatten()
    rollouts, completions = batch
    if not len(rows):
        return Rollouts(**{name: tensor[:0] for name, tensor in vars(rollouts).items()}), completions
    taken = rows.cpu().numpy()
    named = {field.name: getattr(completions, field.name) for field in fields(Completions)}
    arrays = {name: value[taken] if isinstance(value, np.ndarray) else value for name, value in named.items()}
    return rollouts[rows], Completions(**arrays)


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Batches one after the other, padded to one width."""
    rollouts = Rollouts(**{name: _stacked([getattr(part, name) for part, _ in parts]) for name in vars(parts[0][0])})
    names = [field.name for field in fields(Completions) if field.name != "temperature"]
    arrays = {name: _stacked([torch.from_numpy(getattr(part, name)) for _, part in parts]).numpy() for name in names}
    return rollouts, Completions(**arrays, temperature=parts[0][1].temperature)


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [row] or [row, column] below each other; missing columns are 0."""
    width = max(tensor.shape[-1] for tensor in tensors)
    if tensors[0].ndim == 2:
        tensors = [torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
    return torch.cat(list(tensors))
