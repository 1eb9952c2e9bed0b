"""Training goes on where the process of its vLLM engine is killed. With a toy in vLLM's place, so that it is tested
without one too; tests/test_samplers_vllm.py does it to the real one.
"""

import os
import sys
from pathlib import Path

import pytest

import tiny
import tiny_rl
from rlhfscale.bed import rungs
from rlhfscale.rl import PPO
from rlhfscale.samplers import request_seeds
from rlhfscale.samplers.vllm import VLLM, EngineDied, environment
from test_grid import alive
from test_samplers_vllm import killed_during_requests


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a toy engine for the tiny model."""
    toy = str(Path(__file__).with_name("toy_vllm"))
    monkeypatch.syspath_prepend(toy)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([toy, *sys.path]))
    rungs.save_model(tiny.model(), tmp_path / "model")
    return lambda: VLLM(tmp_path / "model", dtype="fp32", max_lora_rank=8)


def test_the_engine_sees_nothing_of_the_processes_that_train(monkeypatch):
    """What torchrun and accelerate set, which would join the engine's processes to theirs."""
    launched = (
        "RANK LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE ROLE_NAME"
        " MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_RESTART_COUNT"
    )
    for name in launched.split():
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HOSTNAME", "here")
    found = environment(1, 1)
    assert not found.keys() & set(launched.split()) and found["HOSTNAME"] == "here"


def test_training_with_an_engine_that_is_killed_ends_in_the_weights_of_an_undisturbed_run(start):
    """It is started again with the adapter that it had, and asked again."""
    found = {}
    for deaths in (0, 2):
        with start() as engine:
            first = engine._process.pid
            run = tiny_rl.trainer(PPO, sampler=engine)
            tiny_rl.updates(run, 1)
            for update in range(deaths):
                with killed_during_requests(engine, 1):
                    run.update(tiny_rl.prompts(run, update))
            for update in range(deaths, 2):
                run.update(tiny_rl.prompts(run, update))
            assert (engine._process.pid != first) == bool(deaths) and alive(first) != bool(deaths)
        found[deaths] = tiny.weights(run.networks)
    assert tiny.equal(found[0], found[2])


def test_one_that_dies_again_is_an_error_that_says_how_and_a_later_call_starts_another(start):
    seeds = request_seeds((0,), 1)
    with start() as engine:
        before = engine.sample([[5]], seeds=seeds, max_new_tokens=4).ids.tolist()
        with killed_during_requests(engine, 2), pytest.raises(EngineDied, match="exit code -9; the last lines"):
            engine.sample([[5]], seeds=seeds, max_new_tokens=4)
        assert engine.sample([[5]], seeds=seeds, max_new_tokens=4).ids.tolist() == before
