"""Toy stages for the tests of the store, the grid and the command line: specs, and the functions that make them."""

import gzip
import json
import os
import signal
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.numpy import save_file

from rlhfscale.runs.spec import Needs, Spec
from rlhfscale.study.params import FigureParams, field


class Number(Spec):
    """Writes its value. ``trace``: a file that gets a line at each computation."""

    stage: ClassVar[str] = "number"
    runner: ClassVar[str] = "toy_stages:make_number"

    value: int
    sleep_s: float = 0.0
    trace: str = ""
    gpus: int = 0

    @property
    def cost_s(self) -> float:
        return self.sleep_s or 0.01

    @property
    def needs(self) -> Needs:
        return Needs(gpus=self.gpus)


class Total(Spec):
    """The sum of its parts. ``mood``: what goes wrong."""

    stage: ClassVar[str] = "total"
    runner: ClassVar[str] = "toy_stages:make_total"

    parts: tuple[Spec, ...]
    mood: str = ""
    sleep_s: float = 0.0
    trace: str = ""

    @property
    def cost_s(self) -> float:
        return self.sleep_s or 0.01


class Together(Spec):
    """What each of two processes finds. ``mood``: what goes wrong in the second one. ``cpus``: of each machine.
    ``trace``: a file that gets each process's number and id."""

    stage: ClassVar[str] = "together"
    runner: ClassVar[str] = "toy_stages:make_together"

    part: Number
    mood: str = ""
    trace: str = ""
    cpus: float = 1.0
    machines: int = 1

    @property
    def needs(self) -> Needs:
        return Needs(cpus=self.cpus, gpus=2, machines=self.machines)


class Files(Spec):
    """Writes files of the kinds that artifacts hold, and one of ``large_kib``."""

    stage: ClassVar[str] = "files"
    runner: ClassVar[str] = "toy_stages:make_files"

    value: int = 1
    large_kib: int = 0
    trace: str = ""


def make_together(spec: Together, inputs: dict[str, Path], folder: Path) -> None:
    import torch

    from rlhfscale.models import parallel

    if spec.trace:
        with open(spec.trace, "a") as file:
            file.write(f"{parallel.rank()} {os.getpid()}\n")
    if spec.mood == "raise" and parallel.rank() == 1:
        raise ValueError("loss is NaN at step 3")
    if spec.mood == "die" and parallel.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.mood == "hang once" and parallel.rank() == 1 and Path(spec.trace).read_text().count("\n") <= 2:
        time.sleep(1000)
    total = parallel.summed(torch.tensor(read(inputs[spec.part.key]) * 10 ** parallel.rank()))
    (folder / f"{parallel.rank()}.txt").write_text("")
    (folder / "value.json").write_text(json.dumps(int(total)))


def make_number(spec: Number, inputs: dict[str, Path], folder: Path) -> None:
    _note(spec)
    (folder / "half.txt").write_text("x" * 1000)
    time.sleep(spec.sleep_s)
    _write(folder, spec.value)


def make_total(spec: Total, inputs: dict[str, Path], folder: Path) -> None:
    _note(spec)
    (folder / "half.txt").write_text("x" * 1000)
    time.sleep(spec.sleep_s)
    if spec.mood == "raise":
        print("said before failing")
        raise ValueError("loss is NaN at step 3")
    if spec.mood == "die" or (spec.mood == "die once" and Path(spec.trace).read_text().count("\n") == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.mood == "disk full":
        raise OSError(28, "No space left on device")
    if spec.mood == "threads":
        _write(folder, int(os.environ["OMP_NUM_THREADS"]))
    else:
        _write(folder, sum(read(inputs[part.key]) for part in spec.parts))


def make_files(spec: Files, inputs: dict[str, Path], folder: Path) -> None:
    save_file({"weight": np.arange(64, dtype=np.float32) * spec.value}, folder / "model.safetensors")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 8, "alpha": 16.0}))
    (folder / "values.csv").write_text("seed,value\n0,0.25\n1,0.5\n")
    (folder / "values.csv.gz").write_bytes(gzip.compress(b"seed,value\n0,0.25\n" * 50, mtime=0))
    (folder / "byte").write_bytes(b"x")
    if spec.large_kib:
        _note(spec)
        (folder / "large").write_bytes(bytes(1024 * spec.large_kib))


def read(folder: Path) -> int:
    return json.loads((folder / "value.json").read_text())


def _write(folder: Path, value: int) -> None:
    (folder / "half.txt").unlink()
    (folder / "value.json").write_text(json.dumps(value))


def _note(spec: Number | Total | Files) -> None:
    if spec.trace:
        with open(spec.trace, "a") as file:
            file.write(f"{spec.key} {os.getpid()}\n")


class ToyParams(FigureParams):
    figure: ClassVar[str] = "91_toy"
    title: ClassVar[str] = "a toy figure"
    claims: ClassVar[tuple[str, ...]] = ("T1",)

    seeds: tuple[int, ...] = field((1, 2), role="scientific", doc="seeds of the runs", min_length=1)
    best_of: int = field(4, role="nuisance", doc="samples", ge=1)
    lr: float = field(0.1, role="fixed", doc="learning rate", gt=0)
    mood: str = field("", role="fixed", doc="what goes wrong")

    def specs(self) -> tuple[Spec, ...]:
        return tuple(
            Total(parts=(Number(value=seed), Number(value=self.best_of)), mood=self.mood) for seed in self.seeds
        )


class OtherParams(ToyParams):
    figure: ClassVar[str] = "92_other"
    title: ClassVar[str] = "another toy figure"


class ThirdParams(ToyParams):
    figure: ClassVar[str] = "93_third"
    title: ClassVar[str] = "a third toy figure"
