"""The optimiser of a trainer, with clipped gradients and a check that numbers are finite; and its checkpoints."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhfscale.models import parallel
from rlhfscale.models.files import replace_file
from rlhfscale.models.lm import Diverged

STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint is missing or belongs to another run; the message names the folder and what differs."""


class Learner:
    """AdamW over named groups of parameters, each with its own learning rate and its own clipped gradient norm.

    Args:
        networks: the networks that are trained (see `networks`).
        rates: learning rate of each role, such as ``{"policy": 1e-4, "critic": 1e-3}``.
        warmup_updates: number of updates over which the rates rise linearly.
        weight_decay: weight decay of every group.
        max_grad_norm: the gradient of each group is clipped to this norm.
    """

    def __init__(
        self,
        networks: nn.Module,
        rates: dict[str, float],
        *,
        warmup_updates: int,
        weight_decay: float,
        max_grad_norm: float,
    ):
        self.networks, self.rates = networks, rates
        self.warmup_updates, self.max_grad_norm = warmup_updates, max_grad_norm
        self.parameters = {role: networks.parameters_of(role) for role in rates}
        groups = [{"params": self.parameters[role], "lr": rate} for role, rate in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    def set_rates(self, update: int) -> None:
        """Set the learning rates of an update (from 0), which rise linearly during the warm-up."""
        factor = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates.values(), strict=True):
            group["lr"] = factor * rate

    @contextmanager
    def step(self, update: int) -> Iterator[dict[str, float]]:
        """Take one optimiser step on the gradients that the ``with`` block accumulates; yields a record of the step.

        The block adds its losses to the record. Gradients are then clipped and checked before any weight moves.

        Raises:
            Diverged: a recorded loss or a gradient norm is not finite (names the update).
        """
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, float] = {}
        yield record
        parallel.sum_gradients(p for parameters in self.parameters.values() for p in parameters)
        for role, parameters in self.parameters.items():
            record[f"{role}_grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).item()
        if not torch.tensor(list(record.values())).isfinite().all():
            found = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in record.items())
            raise Diverged(f"update {update}: {found}; lower the learning rate, or look at the rewards")
        self.optimizer.step()
        for parameters in self.parameters.values():  # the fused optimiser does not, and merged weights go by it
            torch.autograd.graph.increment_version(parameters)

    def save(self, folder: Path, state: dict) -> None:
        """Write networks, optimiser and ``state``; a process killed meanwhile leaves the old or the new checkpoint."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.networks.save(temporary)
        moments = {
            f"{index}.{name}": tensor.contiguous()
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, tensor in entry.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        state = state | {"model": self.networks.fingerprint}
        (temporary / STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n")
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # if not, a kill has left the old one alone
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path, expected: dict) -> dict:
        """Read back a checkpoint that `save` wrote, and return its state.

        Raises:
            CheckpointError: there is no checkpoint, it is another model's, or its state differs from ``expected``.
        """
        folder = latest(folder)
        state = json.loads((folder / STATE).read_text())
        for name, value in (expected | {"model": self.networks.fingerprint}).items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"{folder}: its {name} is {state.get(name)!r}, this run's is {value!r}; resume with what it was"
                    " made with, or choose another folder"
                )
        self.networks.load(folder)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return state


def exists(folder: Path) -> bool:
    """Whether a checkpoint can be read from a folder."""
    return any((candidate / STATE).is_file() for candidate in _candidates(folder))


def spread(folder: Path) -> bool:
    """Whether the first process has a checkpoint in a folder; if so, the other processes get a copy of it.

    Processes of other machines may have another file system: the copy is written into their folder of that name.
    """
    found = {}
    if parallel.rank() == 0 and exists(folder):
        source = latest(folder)
        files = (str(path.relative_to(source)) for path in source.rglob("*") if path.is_file() and path.name != STATE)
        found = {"state": (source / STATE).read_text(), "files": sorted(files)}
    found = json.loads(parallel.of_first(json.dumps(found).encode()))
    if parallel.size() > 1 and found:
        mine = exists(folder) and (latest(folder) / STATE).read_text() == found["state"]
        for name in found["files"]:
            content = parallel.of_first((latest(folder) / name).read_bytes() if parallel.rank() == 0 else b"")
            if not mine:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(folder / name, content)
        if not mine:
            replace_file(folder / STATE, found["state"].encode())  # last: it makes the files a checkpoint
        parallel.barrier()  # nobody reads what another one writes
    return bool(found)


def latest(folder: Path) -> Path:
    """The folder of the newest whole checkpoint: the one before, where a process was killed between two renames."""
    for candidate in _candidates(folder):
        if (candidate / STATE).is_file():
            return candidate
    raise CheckpointError(f"{folder}: no checkpoint there")


def _candidates(folder: Path) -> tuple[Path, Path]:
    return folder, folder.with_name(folder.name + ".old")
