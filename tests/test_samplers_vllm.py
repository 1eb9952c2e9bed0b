"""The real vLLM: its log-probabilities against hf's and a plain forward pass, adapters, deaths, training through it.

One engine serves most tests. vLLM's attention on a CPU takes heads of 32 and more, which the ladder's have not.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
import tiny_rl
from rlhfscale.bed import ladder, rungs
from rlhfscale.bed.ladder import EOS_ID
from rlhfscale.rl import PPO, networks
from rlhfscale.samplers import hf, repeated, request_seeds
from rlhfscale.samplers.vllm import VLLM, EngineDied, available, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="vllm is not installed; make setup EXTRAS=vllm"),
    pytest.mark.xdist_group("vllm"),
]

MAX_RANK, CONTEXT = 8, 128
ENDS = (EOS_ID, 40)
"""What ends a response, by the model's generation config; the tokenizer knows the first."""


def language_model(dtype=torch.float32):
    shape = {"hidden_size": 128, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
    model = tiny_rl.language_model(vocab_size=ladder.vocab_size(), scale=3.0, **shape).to(dtype)
    model.generation_config.eos_token_id = list(ENDS)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    rungs.save_model(language_model(), folder)
    return folder


@pytest.fixture(scope="module")
def shared_engine(folder):
    with VLLM(folder, dtype="fp32", max_lora_rank=MAX_RANK, enforce_eager=True, kv_cache_gib=1, threads=1) as sampler:
        yield sampler


@pytest.fixture
def engine(shared_engine):
    shared_engine.load_adapter(None)
    return shared_engine


def sample(sampler, prompts, entropy=0, max_new_tokens=12, **options):
    return sampler.sample(
        prompts, seeds=request_seeds((entropy,), len(prompts)), max_new_tokens=max_new_tokens, **options
    )


def gaps(model, prompts, found, temperature=1.0):
    """Absolute differences to a plain forward pass, of each token."""
    parts = []
    for prompt, completion in zip(prompts, found, strict=True):
        logprobs = tiny.full_logprobs(model, [*prompt, *completion.token_ids], temperature)[len(prompt) - 1 :]
        chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        parts.append((chosen - torch.tensor(completion.logprobs)).abs())
    return torch.cat(parts)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_logprobs_are_those_of_a_plain_forward_pass_at_the_temperature(engine, temperature):
    """Of vLLM and of hf; greedy is stated at 1 and takes the same tokens in both."""
    model, prompts = language_model(), tiny.prompts(24)
    found = sample(engine, prompts, temperature=temperature)
    assert gaps(model, prompts, found, temperature or 1.0).mean() < 1e-5
    ours = hf.sample(model, prompts, seeds=request_seeds((0,), 24), max_new_tokens=12, temperature=temperature)
    assert gaps(model, prompts, ours, temperature or 1.0).mean() < 1e-5
    if temperature == 0:
        assert [c.token_ids for c in found] == [c.token_ids for c in ours]


def test_frequencies_of_the_first_token_are_the_softmax(engine):
    count, prompt = 3000, tiny.prompts(1)[0]
    found = sample(engine, [prompt] * count, max_new_tokens=1, temperature=0.8, ignore_eos=True)
    expected = tiny.full_logprobs(language_model(), [*prompt, 0], 0.8)[-1].exp().numpy() * count
    observed = np.bincount(found.ids[:, 0], minlength=len(expected))
    likely = expected > 5
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_layers_split_over_two_processes_give_the_same_policy(folder, monkeypatch):
    """Also below torchrun, whose variables would make all of vLLM's processes wait for another."""
    launched = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 1, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    model, prompts = language_model(), tiny.prompts(8)
    options = {"dtype": "fp32", "max_lora_rank": MAX_RANK, "enforce_eager": True, "kv_cache_gib": 1, "threads": 1}
    with VLLM(folder, tensor_parallel=2, **options) as sampler:
        assert gaps(model, prompts, sample(sampler, prompts)).max() < 2e-5
        run = tiny_rl.trainer(base=model, lora_rank=MAX_RANK, sampler=sampler, policy_lr=1e-2, max_sampler_gap=1e-4)
        records = tiny_rl.updates(run, 2)
        assert abs(records[1]["kl_nats"]) > 1e-4, "the second one is sampled under an adapter that does something"
        assert max(record["sampler_gap_nats"] for record in records) < 1e-4
    with pytest.raises(ValueError, match="pipeline_parallel: vLLM does not split layers over processes of a CPU"):
        VLLM(folder, pipeline_parallel=2, **options)


def test_completions_are_in_order_and_well_formed(engine):
    prompts = repeated(tiny.prompts(6), 4, 1.0)
    seeds = request_seeds((3,), len(prompts))
    tokenizer = rungs.build_tokenizer()
    found = engine(None, prompts, seeds=seeds, max_new_tokens=20, tokenizer=tokenizer)
    assert found.seeds is seeds and 0 < found.finished.sum() < len(prompts)
    assert gaps(language_model(), prompts, found).mean() < 1e-5  # each belongs to its prompt
    assert len({completion.token_ids for completion in found}) > len(prompts) / 2
    for completion in found:
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] in ENDS)
        assert not set(ENDS) & set(completion.token_ids[:-1])
    assert {completion.token_ids[-1] for completion in found} >= set(ENDS)
    again = engine(None, prompts, seeds=seeds, max_new_tokens=20, tokenizer=tokenizer)
    assert np.mean(again.ids == found.ids) > 0.95  # equal but for rounding, see the module
    full = engine(None, prompts, seeds=seeds, max_new_tokens=20, tokenizer=tokenizer, ignore_eos=True)
    assert (full.lengths == 20).all() and not full.finished.any()


def test_ends_that_were_set_on_the_model_that_is_trained_end_its_responses(engine):
    net = networks.build(language_model(), critic="none", rank=4)
    net.base.generation_config.eos_token_id = list(range(20, 50))
    prompts = repeated(tiny.prompts(6), 4, 1.0)
    options = {"seeds": request_seeds((3,), len(prompts)), "max_new_tokens": 20, "tokenizer": rungs.build_tokenizer()}
    engine.push(net)
    for completion in engine(None, prompts, **options):
        ended = [token in (*ENDS, *range(20, 50)) for token in completion.token_ids]
        assert not any(ended[:-1]) and ended[-1] == (completion.finish_reason == "stop")
    engine.load_adapter(None)
    assert any(set(c.token_ids[:-1]) & set(range(41, 50)) for c in engine(None, prompts, **options))


def test_adapters_are_swapped_in_place(engine):
    """After each of three pushes to one engine, and with its prefix cache warm from the one before."""
    net, prompts = networks.build(language_model(), critic="none", rank=4), repeated(tiny.prompts(8), 3, 1.0)
    long = [[*prompt, *([5] * 40)] for prompt in prompts]
    seen = []
    for swap in range(3):
        tiny_rl.randomise(net, swap, std=0.2)
        engine.push(net)
        with net.as_peft("policy") as model:
            for given in (prompts, long):
                seen.append(sample(engine, given))
                assert gaps(model, given, seen[-1]).mean() < 1e-4
        with net.decoder() as policy:
            ours = hf.sample(policy, prompts, seeds=request_seeds((0,), len(prompts)), max_new_tokens=12)
        with net.as_peft("policy") as model:
            assert gaps(model, prompts, ours).mean() < 1e-4
    assert seen[0].ids.tolist() != seen[2].ids.tolist() != seen[4].ids.tolist()
    engine.load_adapter(None)
    assert gaps(language_model(), prompts, sample(engine, prompts)).mean() < 1e-5


def test_what_cannot_work_is_refused_and_the_engine_goes_on(engine, tmp_path):
    with pytest.raises(ValueError, match=rf"prompts\[0\] has {CONTEXT} tokens.*context of {CONTEXT}"):
        sample(engine, [[5] * CONTEXT])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sample(engine, [[5], []])
    with pytest.raises(ValueError, match=r"token id 99999 is beyond the vocabulary"):
        sample(engine, [[99999]])
    with pytest.raises(ValueError, match="no adapter there"):
        engine.load_adapter(tmp_path)
    large = networks.build(language_model(), critic="none", rank=12)
    with pytest.raises(ValueError, match="its rank is 12, the engine's max_lora_rank 8; start it with one of 16, 32"):
        engine.push(large)
    other = networks.build(tiny_rl.language_model(num_key_value_heads=2), critic="none", rank=4)
    with pytest.raises(ValueError, match="no adapter of this model"):
        engine.push(other)
    with pytest.raises(ValueError, match="use adapter: lora"):
        engine.push(networks.build(language_model(), adapter="none", critic="none"))
    assert len(sample(engine, [[5]])) == 1


@contextmanager
def killed_during_requests(sampler, times: int):
    """Within this context the engine is killed while it works on each of the next ``times`` requests."""
    process_class, left = type(sampler._process), times
    write = process_class._write

    def write_and_kill(process, message):
        nonlocal left
        write(process, message)
        if message.get("do") == "sample" and left:
            left -= 1
            time.sleep(0.05)
            os.kill(process.pid, signal.SIGKILL)

    process_class._write = write_and_kill
    try:
        yield
    finally:
        process_class._write = write


def test_an_engine_that_is_killed_is_started_again_with_its_adapter(engine):
    net = tiny_rl.randomise(networks.build(language_model(), critic="none", rank=4), 7)
    engine.push(net)
    prompts = repeated(tiny.prompts(16), 8, 1.0)
    first = engine._process.pid
    with killed_during_requests(engine, 1):
        found = sample(engine, prompts, max_new_tokens=64)
    assert engine._process.pid != first and not alive(first)
    with net.as_peft("policy") as model:
        assert gaps(model, prompts, found).mean() < 1e-4
    with killed_during_requests(engine, 2), pytest.raises(EngineDied, match="exit code -9; the last lines"):
        sample(engine, prompts, max_new_tokens=64)
    assert len(sample(engine, prompts[:1])) == 1  # a later call starts another


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("deaths", [0, 1])
def test_ppo_learns_through_it(engine, deaths):
    """Also where the engine is killed on the way: the next one is given the adapter, or the gap would stop the run."""
    run = tiny_rl.trainer(PPO, base=language_model(), sampler=engine, max_sampler_gap=1e-4)
    first = engine._process.pid
    with killed_during_requests(engine, deaths):
        for record in tiny_rl.updates(run, 2):
            assert record["sampler_gap_mean_nats"] < 1e-4 and record["sampler_ratio"] == pytest.approx(1, abs=1e-3)
    assert run.num_updates == 2 and (engine._process.pid != first) == bool(deaths)


def test_bf16_gaps_and_no_orphan_when_the_parent_is_killed(folder, tmp_path):
    """In bf16 the two samplers round differently: 0.02 nats on average is the bound stated for it."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, env=variables
    )
    answer = json.loads(parent.stdout.readline())
    try:
        found = torch.tensor(answer["logprobs"])
        model, expected = language_model(torch.bfloat16), []
        for prompt, ids in zip(answer["prompts"], answer["ids"], strict=True):
            logprobs = tiny.full_logprobs(model, [*prompt, *ids])[len(prompt) - 1 :]
            expected.append(logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0])
        assert (found - torch.stack(expected)).abs().mean() < 0.02
        assert alive(answer["pid"])
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 20
    while alive(answer["pid"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(answer["pid"])


PARENT = """
import json, sys, time
import tiny
from rlhfscale.samplers import request_seeds
from rlhfscale.bed import rungs
from rlhfscale.samplers.vllm import VLLM

sampler = VLLM(sys.argv[1], dtype="bf16", enforce_eager=True, kv_cache_gib=1, threads=1)
prompts = tiny.prompts(16)
found = sampler.sample(prompts, seeds=request_seeds((0,), 16), max_new_tokens=12, ignore_eos=True)
about = {"pid": sampler._process.pid, "prompts": prompts, "ids": found.ids.tolist()}
print(json.dumps(about | {"logprobs": found.logprobs.tolist()}), flush=True)
time.sleep(600)
"""


def test_vllms_own_server_serves_our_adapter(folder, tmp_path):
    """The command of the module's docstring, and a real request by the openai client."""
    import openai

    net = tiny_rl.randomise(networks.build(language_model(), critic="none", rank=4), 9)
    net.save_adapter("policy", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"--model {folder} --enable-lora --max-lora-rank 8 --lora-modules policy={tmp_path / 'policy'}"
    more = f"--dtype float32 --enforce-eager --host 127.0.0.1 --port {port} --generation-config vllm"
    log = tmp_path / "server.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command.split(), *more.split()],
            stdout=file, stderr=file, env=environment(1, 1) | {"HF_HUB_OFFLINE": "1"}, start_new_session=True,
        )  # fmt: skip
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        answer = wait_for(client, server, log)
        with net.decoder() as policy:
            expected = hf.sample(policy, [PROMPT], seeds=request_seeds((0,), 1), max_new_tokens=8, temperature=0.0)[0]
        text = rungs.build_tokenizer().decode(expected.token_ids, skip_special_tokens=True)
        assert answer.model == "policy" and answer.choices[0].text.split() == text.split()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


PROMPT = [1, 5, 6, 7, 8]


def wait_for(client, server, log, seconds=240):
    import openai

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return client.completions.create(model="policy", prompt=PROMPT, max_tokens=8, temperature=0.0)
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
