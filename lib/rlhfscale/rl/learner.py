"""The optimiser of a trainer, with clipped gradients and a check that numbers are finite; and its checkpoints."""

import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhfscale.models import parallel
from rlhfscale.models.files import replace_file, sealed, sha256
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
        schedule, decay_updates: how rates fall afterwards, see `Config`.
        weight_decay: weight decay of every group.
        max_grad_norm: the gradient of each group is clipped to this norm.
    """

    def __init__(
        self,
        networks: nn.Module,
        rates: dict[str, float],
        *,
        warmup_updates: int,
        schedule: str = "constant",
        decay_updates: int | None = None,
        weight_decay: float,
        max_grad_norm: float,
    ):
        self.networks, self.rates = networks, rates
        self.warmup_updates, self.max_grad_norm = warmup_updates, max_grad_norm
        self.schedule, self.decay_updates = schedule, decay_updates
        self.parameters = {role: networks.parameters_of(role) for role in rates}
        groups = [{"params": self.parameters[role], "lr": rate} for role, rate in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)

    def set_rates(self, update: int) -> None:
        """Set the learning rates of an update (from 0): a function of its number alone, so that resuming is exact."""
        factor = rate_factor(update, self.warmup_updates, self.schedule, self.decay_updates)
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
        """Write networks, optimiser and ``state``; the checkpoint before stays beside it.

        A process killed at any moment leaves a whole checkpoint, which `latest` finds.
        """
        temporary, old = beside(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self.networks.save(temporary)
        moments = {
            f"{index}.{name}": tensor.contiguous()
            for index, entry in self.optimizer.state_dict()["state"].items()
            for name, tensor in entry.items()
        }
        save_file(moments, temporary / "optimizer.safetensors")
        state = state | {"model": self.networks.fingerprint, "files": digests(temporary)}
        (temporary / STATE).write_bytes(sealed(state))
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)

    def load(self, folder: Path, expected: dict) -> dict:
        """Read back a checkpoint that `save` wrote, and return its state.

        Raises:
            CheckpointError: there is no whole checkpoint, it is another model's, or its state differs from
                ``expected``; the message says what differs.
        """
        folder = latest(folder)
        state = json.loads((folder / STATE).read_text())
        if differing := differences(state, expected | {"model": self.networks.fingerprint}):
            raise CheckpointError(
                f"{folder}: it belongs to another run: {'; '.join(differing)}; resume with what it was made with, or"
                " choose another folder"
            )
        self.networks.load(folder)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / "optimizer.safetensors").items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return state


def rate_factor(update: int, warmup: int, schedule: str = "constant", decay: int | None = None) -> float:
    """What the learning rates of an update (from 0) are multiplied by: a linear rise, then the schedule of `Config`."""
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (update - warmup) / (decay - warmup))
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def differences(there: dict, here: dict, within: str = "") -> list[str]:
    """``name: value there, value here`` of each value of ``here`` that is another one there; dicts entry by entry."""
    found = []
    for name, value in here.items():
        if isinstance(value, dict) and isinstance(there.get(name), dict):
            found += differences(there[name], value, f"{within}{name}." if name != "config" else "")
        elif there.get(name) != value:
            found.append(f"{within}{name}: {there.get(name)} there, {value} here")
    return found


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint, whole or damaged."""
    return any((candidate / STATE).is_file() for candidate in (folder, *beside(folder)))


def spread(folder: Path) -> bool:
    """Whether the first process has a checkpoint in a folder; if so, the other processes get a copy of it.

    Processes of other machines may have another file system: the copy is written into their folder of that name.
    """
    if parallel.size() == 1:
        return exists(folder)  # `latest` looks at its content when it is read
    found, source = {}, None
    if parallel.rank() == 0 and exists(folder):
        source = latest(folder)
        state = (source / STATE).read_text()
        found = {"state": state, "files": sorted(json.loads(state)["files"])}
    found = json.loads(parallel.of_first(json.dumps(found).encode()))
    if found:
        mine = False
        with suppress(CheckpointError):
            mine = (latest(folder) / STATE).read_text() == found["state"]
        for name in found["files"]:
            content = parallel.of_first((source / name).read_bytes() if source else b"")
            if not mine:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(folder / name, content)
        if not mine:
            replace_file(folder / STATE, found["state"].encode())  # last: it makes the files a checkpoint
        parallel.barrier()  # nobody reads what another one writes
    return bool(found)


def latest(folder: Path) -> Path:
    """The folder of the newest whole checkpoint. A damaged one is named in a warning.

    A process killed between two renames has left the newest under its temporary name, or only the one before.
    """
    problems, (temporary, old) = [], beside(folder)
    for candidate in (folder, temporary, old):
        problem = damage(candidate)
        if problem is None:
            if problems:
                warnings.warn(f"damaged checkpoint: {'; '.join(problems)}; going on from {candidate}", stacklevel=2)
            return candidate
        if candidate.exists() and candidate != temporary:  # one that was not finished is no damage
            problems.append(problem)
    raise CheckpointError("; ".join(problems) or f"{folder}: no checkpoint there")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint in a folder, naming the file; None where every file is as it was written."""
    try:
        content, found = (folder / STATE).read_bytes(), digests(folder)
        state = json.loads(content)
        if content != sealed(state):
            return f"{folder / STATE} has changed since it was written"
        for name, digest in state["files"].items():
            if name not in found:
                return f"{folder / name} is missing"
            if found[name] != digest:
                return f"{folder / name} has changed since it was written"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{folder / STATE} does not describe a checkpoint"
    return None


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint but its state, by its name within the folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(paths)}


def beside(folder: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written before it is whole, and where the one before it is kept."""
    return folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
