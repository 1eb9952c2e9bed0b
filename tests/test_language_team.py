"""The stages of the study on published checkpoints, made by two processes that share the base: the artifacts of one."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file  # numpy knows no bfloat16

import processes
import tiny_chat
from test_language_figures import SHAPES, TASKS

pytest.importorskip("reasoning_gym", reason="make setup EXTRAS=smollm2")
pytestmark = pytest.mark.xdist_group("parallel")

RUN = Path(__file__).with_name("language_run.py")
STAGES = ("answers", "tuned", "answer_reward", "aligned", "answer_scores")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, root = tmp_path_factory.mktemp("made"), tmp_path_factory.mktemp("checkpoints")
    for name, (width, backwards) in SHAPES.items():
        tiny_chat.save_guesser(root / name, TASKS, width, backwards=backwards)
    for size in (1, 2):
        processes.run(RUN, folder, root, size=size)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_make_what_one_makes(made, stage):
    alone = sorted((made / "0-of-1" / "tmp").glob(f"{stage}-*"))
    assert alone
    for folder in alone:
        same_files(folder, made / "0-of-2" / "tmp" / folder.name)


def test_only_the_first_process_writes_weights_and_nothing_is_left_of_checkpoints(made):
    assert not list((made / "1-of-2" / "tmp").glob("tuned-*/model"))
    assert not list(made.glob("*/checkpoints/*"))


def same_files(folder: Path, other: Path) -> None:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    for name in sorted(names):
        compare = {".safetensors": same_tensors, ".csv": same_table, ".json": same_json}.get(Path(name).suffix)
        if compare:
            compare(folder / name, other / name)


def same_tensors(path: Path, other: Path) -> None:
    first, second = (tensors(file) for file in (path, other))
    assert first.keys() == second.keys(), path
    rounded = 1e-2 if path.parts[-2] == "model" and path.name == "model.safetensors" else 1e-4
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=rounded, atol=rounded, err_msg=f"{path} {name}")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_file(path).items()}


def same_table(path: Path, other: Path) -> None:
    first, second = pd.read_csv(path), pd.read_csv(other)
    timed = [name for name in first if name.endswith("_s") or "seconds" in name]
    pd.testing.assert_frame_equal(first.drop(columns=timed), second.drop(columns=timed), rtol=1e-3, atol=1e-4)


def same_json(path: Path, other: Path) -> None:
    first, second = json.loads(path.read_text()), json.loads(other.read_text())
    if path.name == "reward.json":
        for name in ("mean", "std"):
            assert first.pop(name) == pytest.approx(second.pop(name), rel=1e-3, abs=1e-4)
    if path.name == "adapter_config.json":  # a set, in PEFT's order of the day
        assert set(first.pop("target_modules")) == set(second.pop("target_modules"))
    assert first == second, path
