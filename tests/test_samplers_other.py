"""What the samplers share, what trainers ask of one, which one is chosen, and prompts that are given several times."""

import sys

import numpy as np
import pytest
import torch
import transformers

import tiny
import tiny_rl
from rlhfscale.bed.ladder import EOS_ID
from rlhfscale.bench import run
from rlhfscale.rl import GRPO, PPO, RLOO, networks
from rlhfscale.rl.loop import SamplerGap
from rlhfscale.samplers import Completions, auto, hf, repeated, request_seeds, vllm
from rlhfscale.study.params import ParamsError


def test_repeated_prompts_are_in_a_row():
    assert repeated([[1], [2, 3]], 2, 1.0) == [[1], [1], [2, 3], [2, 3]]
    assert repeated([[1]], 1, 0.0) == [[1]]


@pytest.mark.parametrize(
    ("num_samples", "temperature", "message"),
    [(0, 1.0, "num_samples: 0"), (8, 0.0, "temperature 0 all 8 samples of a prompt would be equal")],
)
def test_samples_that_make_no_sense_are_refused(num_samples, temperature, message):
    with pytest.raises(ValueError, match=message):
        repeated([[1]], num_samples, temperature)


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_prompt_that_is_repeated_is_read_once_and_sampled_the_same(kind, monkeypatch):
    """By our decoder and by transformers': each response is that of its prompt and seed alone."""
    model = tiny_rl.language_model(kind)
    prompts = repeated([[3, 4, 5], [6], [7, 8]], 4, 1.0)
    seeds = request_seeds((0,), len(prompts))
    read = []
    step = hf.TransformersDecoder.step
    monkeypatch.setattr(hf.TransformersDecoder, "step", lambda *a: (read.append(len(a[1])), step(*a))[1])
    found = hf.sample(model, prompts, seeds=seeds, max_new_tokens=12)
    assert read[:2] == ([] if kind == "Llama" else [3, 12])
    for i, completion in enumerate(found):
        alone = hf.sample(model, prompts[i : i + 1], seeds=seeds[i : i + 1], max_new_tokens=12)[0]
        assert completion.token_ids == alone.token_ids
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2"])
def test_a_model_that_is_sampled_from_is_left_alone(kind, tmp_path):
    """Our decoder copies what it joins: no weight moves, and the model can be trained, saved and changed afterwards."""
    options = {"sliding_window": None} if kind == "Mistral" else {}
    model = tiny_rl.language_model(kind, num_key_value_heads=2, **options)
    before, places = tiny.weights(model), [p.data_ptr() for p in model.parameters()]
    seeds = request_seeds((1,), 3)
    first = hf.sample(model, [[5, 6], [7], [5, 6]], seeds=seeds, max_new_tokens=6)
    assert tiny.equal(before, tiny.weights(model)) and [p.data_ptr() for p in model.parameters()] == places
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    second = hf.sample(model, [[5, 6], [7], [5, 6]], seeds=seeds, max_new_tokens=6)
    assert first.ids.tolist() != second.ids.tolist()
    for completion, prompt in zip(second, [[5, 6], [7], [5, 6]], strict=True):
        logprobs = tiny.full_logprobs(model, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    model.save_pretrained(tmp_path)


def test_adapters_of_peft_are_sampled_under():
    """Not by our decoder, which would see the base alone."""
    net = tiny_rl.randomise(networks.build(tiny_rl.language_model(), critic="none", rank=4))
    with net.as_peft("policy") as model:
        base = model.base_model.model
        found = hf.sample(base, [[5, 6]] * 3, seeds=request_seeds((2,), 3), max_new_tokens=6)
        expected = tiny.full_logprobs(base, [5, 6, *found[0].token_ids])[1:]
        chosen = expected.gather(1, torch.tensor(found[0].token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(found[0].logprobs, chosen.numpy(), atol=1e-4)


class Scripted:
    """A sampler that takes each response from a list by its seed, and states the log-probability -1 of every token."""

    def __init__(self, *responses):
        self.responses, self.pushed, self.num_calls = responses, [], 0

    def push(self, networks):
        self.pushed.append(networks)

    def __call__(self, model, prompts, *, seeds, max_new_tokens, temperature, tokenizer):
        self.num_calls += 1
        out = Completions.empty(seeds, max_new_tokens, temperature)
        for row, seed in enumerate(seeds.tolist()):
            out.put(row, ids := self.responses[seed % len(self.responses)], [-1.0] * len(ids), True)
        return out


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
def test_a_sampler_that_can_be_pushed_to_is_before_every_rollout(algorithm):
    sampler = Scripted([5, 6, EOS_ID], [5, 7, EOS_ID], [5, 8, EOS_ID])
    trainer = tiny_rl.trainer(algorithm, sampler=sampler)
    records = tiny_rl.updates(trainer, 2)
    assert sampler.pushed == [trainer.networks] * 2 and sampler.num_calls == 2
    for record in records:  # the script states -1 for every token
        assert record["sampler_gap_nats"] >= record["sampler_gap_mean_nats"] > 0.1 and record["sampler_ratio"] > 0


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
def test_a_gap_beyond_the_bound_stops_the_run_before_it_learns(algorithm):
    trainer = tiny_rl.trainer(algorithm, sampler=Scripted([5, EOS_ID]), max_sampler_gap=0.05)
    before = tiny.weights(trainer.networks)
    with pytest.raises(SamplerGap, match=r"update 0: .* nats on average, max_sampler_gap is 0.05. Check that"):
        trainer.update(tiny_rl.prompts(trainer))
    assert tiny.equal(before, tiny.weights(trainer.networks))


def test_our_own_sampler_has_no_gap():
    record = tiny_rl.updates(tiny_rl.trainer(max_sampler_gap=1e-4), 1)[0]
    assert record["sampler_ratio"] == pytest.approx(1, abs=1e-4)


def test_missing_vllm_is_one_sentence(monkeypatch):
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(vllm.NotInstalled, match=r"^vllm is not installed; make setup EXTRAS=vllm$") as caught:
        vllm.VLLM("somewhere")
    assert caught.value.__cause__ is None and caught.value.__context__ is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_lora_rank": 12}, "max_lora_rank: 12 .* 1, 8, 16, 32, 64"),
        ({"dtype": "nf4"}, "dtype: 'nf4' .* fp32, bf16"),
    ],
)
def test_engine_options_are_checked_first(options, message):
    with pytest.raises(ValueError, match=message):
        vllm.VLLM("somewhere", **options)


@pytest.mark.parametrize(
    ("model", "device", "installed", "sampler", "why"),
    [
        (tiny.model, None, True, "hf", "a llama on a CPU: our own decoder"),
        (lambda: tiny_rl.language_model("GPT2"), None, True, "hf", "0.0M parameters on a CPU"),
        (lambda: transformers.GPT2Config(), "cpu", True, "vllm", "a gpt2 on cpu"),
        (lambda: transformers.GPT2Config(), "cpu", False, "hf", "make setup EXTRAS=vllm"),
        (tiny.model, "cuda", True, "vllm", "a llama on cuda"),
    ],
)
def test_the_choice_says_why(model, device, installed, sampler, why, monkeypatch):
    monkeypatch.setattr(vllm, "available", lambda: installed)
    choice = auto.choose(model(), device)
    assert choice.sampler == sampler and why in choice.why


def test_benchmarks_against_a_missing_vllm_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(vllm, "available", lambda: False)
    assert all(case.bench != "vllm" for case in run.select("all", sys.executable))
    assert "make setup EXTRAS=vllm" in capsys.readouterr().err
    with pytest.raises(ParamsError, match=r"^vllm is not installed; make setup EXTRAS=vllm$"):
        run.select("vllm", sys.executable)
