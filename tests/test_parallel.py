"""Two processes train what one process trains: fine-tuning, reward models, PPO and GRPO, by gloo on this machine."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import processes
import tiny

RUN = Path(__file__).with_name("parallel_run.py")
NAMES = [
    "sft",
    "rm-all-weights",
    "rm-lora",
    "ppo-trunk",
    "ppo-separate",
    "ppo-passes",
    "ppo-all-weights",
    "grpo",
    "rloo",
    "ppo-one-sampler",
    "few-prompts",
    "ppo-resumed",
]

pytestmark = pytest.mark.xdist_group("parallel")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What one process, and each of two, has trained."""
    folder, base = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("base")
    tiny.model().save_pretrained(base)
    for size in (1, 2):
        processes.run(RUN, folder, base, size=size)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_end_where_one_does(made, name):
    check(made, name)


def test_two_machines_of_two_processes_have_a_sampler_each(made):
    processes.run(RUN, made, made / "unused", "ppo-one-sampler", size=4, per_machine=2)
    check(made, "ppo-one-sampler", copies=("0-of-4", "3-of-4"))


def check(made: Path, name: str, copies: tuple[str, str] = ("0-of-2", "1-of-2")) -> None:
    """Two processes have the same weights and records, and they are those of one process alone."""
    alone, first, second = (load_file(made / who / f"{name}.safetensors") for who in ("0-of-1", *copies))
    assert tiny.equal(first, second), "the copies drifted apart"
    assert alone.keys() == first.keys()
    for key, weight in alone.items():
        np.testing.assert_allclose(first[key].numpy(), weight.numpy(), rtol=1e-4, atol=1e-5, err_msg=key)
    records = [json.loads((made / who / f"{name}.json").read_text()) for who in ("0-of-1", *copies)]
    assert records[1] == records[2]
    np.testing.assert_allclose(records[1], records[0], rtol=1e-4, atol=1e-5)
