"""Two processes that hold a share of the base each train what one process trains, by gloo on this machine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import processes
import tiny
import tiny_rl
from rlhfscale.models import loading
from rlhfscale.rewards import OutcomeRewardModel
from rlhfscale.runs import team
from test_parallel import check

RUN = Path(__file__).with_name("sharding_run.py")
CONFIGS = Path(__file__).parents[1] / "params" / "accelerate"
HAS_NF4 = importlib.util.find_spec("bitsandbytes") is not None
NF4 = pytest.mark.skipif(not HAS_NF4, reason="NF4 needs bitsandbytes: make setup EXTRAS=qlora")
RUNS = {
    "fp32": ["sft", "outcome", "process", "ppo", "ppo-separate", "ppo-bonus", "ppo-shared-reward", "grpo"],
    "nf4": ["sft", "outcome", "ppo", "ppo-separate"],
}
DTYPES = [pytest.param("nf4", marks=NF4) if dtype == "nf4" else dtype for dtype in ("fp32", "bf16", "nf4")]

pytestmark = [pytest.mark.xdist_group("parallel"), pytest.mark.slow]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Matrices that are whole blocks of 64, for the study's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"vocab_size": 56, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    tiny_rl.language_model(scale=3.0, num_key_value_heads=2, **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """What one process, and each of two, has trained and found."""
    folder = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        processes.run(RUN, folder, base, *(RUNS if HAS_NF4 else ["fp32"]), size=size)
    return folder


@pytest.fixture(scope="module")
def facts(made):
    return [json.loads((made / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("dtype", "name"),
    [pytest.param(dtype, name, marks=NF4 if dtype == "nf4" else ()) for dtype, names in RUNS.items() for name in names],
)
def test_two_processes_with_half_a_base_each_end_where_one_does(made, dtype, name):
    check(made, f"{name}-{dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sharded_model_is_the_whole_one_to_the_bit(facts, dtype):
    """Its logits, its fingerprint, and what is sampled from it, also by processes with unequal numbers of requests."""
    for found in facts:
        assert found[dtype]["logits"] and found[dtype]["fingerprint"] and found[dtype]["samples"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_process_holds_half_of_the_base(facts, dtype):
    """After passes in both directions; norms are held whole, and of 4-bit weights the scales."""
    for found in facts:
        beside = 0.03 if dtype != "nf4" else 0.06
        assert 0.5 * found[dtype]["whole"] <= found[dtype]["held"] < (0.5 + beside) * found[dtype]["whole"]


def test_what_needs_all_weights_is_refused(facts):
    for found in facts:
        refused = found["refused"]
        assert "sharded base" in refused["all weights"] and "adapter: lora" in refused["all weights"]
        assert refused["all weights of a reward model"].startswith("lora_rank: 0, but a sharded model")
        assert "give merge=False" in refused["merge"]
        assert "save the adapter" in refused["merged"] and "only adapters" in refused["save"]
        assert "sharded already" in refused["twice"] and "before it gets adapters" in refused["adapters"]
        assert refused["device map"].startswith("device_map: ")


def test_saved_adapters_are_plain_and_continue_on_a_whole_base(made, base):
    """A sharded run's checkpoint is that of a run on a whole base, and its adapters are PEFT's."""
    folder, trained = made / "saved-2" / "ppo-fp32", load_file(made / "0-of-2" / "ppo-fp32.safetensors")
    run = tiny_rl.trainer(base=loading.load_base(base), policy_lr=1e-3)
    run.load(folder / "checkpoint")
    weights = {name: weight for name, weight in tiny.weights(run.networks).items() if name in trained}
    assert run.num_updates == 3 and tiny.equal(weights, trained)
    plain = PeftModel.from_pretrained(loading.load_base(base), folder / "checkpoint" / "policy")
    found = [weight for name, weight in plain.named_parameters() if ".lora_" in name]
    expected = [weight for name, weight in run.networks.named_parameters() if ".lora_" in name]
    assert len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def test_a_saved_reward_model_scores_on_a_whole_base(made, base):
    trained = load_file(made / "0-of-2" / "outcome-fp32.safetensors")
    reward = OutcomeRewardModel.load(made / "saved-2" / "outcome-fp32", loading.load_base(base, head="score"))
    assert tiny.equal({name: w for name, w in tiny.weights(reward.model).items() if name in trained}, trained)


def test_machines_shard_by_themselves(base, tmp_path):
    """Four processes, as on two machines of two: each machine holds all of the base, and all train one model."""
    processes.run(RUN, tmp_path, base, "sft", size=1)
    processes.run(RUN, tmp_path, base, "sft", size=4, per_machine=2)
    close(load_file(tmp_path / "3-of-4" / "sft.safetensors"), load_file(tmp_path / "0-of-1" / "sft.safetensors"))


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fsdp2-lora", "qlora-fsdp"])
def test_accelerate_reads_its_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == "FSDP" and config.num_processes == 8 and config.num_machines == 1
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


def test_accelerate_starts_processes_that_shard(base, tmp_path):
    """As `parallel.start` sees it, ``accelerate launch`` is ``torchrun``; its configuration is what asks for shards."""
    processes.run(RUN, tmp_path, base, "asked", size=1)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "fsdp2-lora.yaml"]
    command += ["--num_processes", 2, "--main_process_port", team.free_port(), RUN, tmp_path, base, "asked"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    close(load_file(tmp_path / "1-of-2" / "sft.safetensors"), load_file(tmp_path / "0-of-1" / "sft.safetensors"))
