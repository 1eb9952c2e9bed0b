"""The in-process sampler: its distribution, its log-probabilities, and that a response depends on its seed alone."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tiny
from rlhfscale.bed import ladder
from rlhfscale.bed.ladder import CONTEXT, EOS_ID, PAD_ID
from rlhfscale.samplers import Completion, hf, request_seeds
from rlhfscale.samplers.base import uniforms

TABLE = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) * 1.5
"""Hand-set logits: row i are those of the token after i. Token 2 ends a response."""


def markov():
    """A Llama whose next-token logits are exactly TABLE[last token]: unit embeddings, and blocks that add nothing."""
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rms_norm_eps=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(5, 16))
        model.lm_head.weight.zero_()[:, :5] = TABLE.T / 4  # the norm makes a unit vector of width 16 four long
    return model


@pytest.fixture(scope="module")
def model():
    """The end of sequence is made likelier, so that most responses end, at different steps."""
    built, bias = tiny.model(), torch.zeros(ladder.vocab_size())
    bias[EOS_ID] = 2.0
    built.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return built


@pytest.fixture(scope="module")
def prompts():
    return tiny.prompts(60)


def sample(model, prompts, seeds, max_new_tokens=16, **options):
    return hf.sample(model, prompts, seeds=seeds, max_new_tokens=max_new_tokens, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax_at_the_temperature(temperature):
    count = 40_000
    found = sample(markov(), [[1]] * count, request_seeds((0,), count), 2, temperature=temperature, batch_size=count)
    first, second = found.ids[:, 0], found.ids[:, 1]
    probabilities = torch.softmax(TABLE.double() / temperature, -1).numpy()
    for previous, tokens in [(1, first), *[(i, second[first == i]) for i in (0, 1, 3, 4)]]:
        expected = probabilities[previous] * len(tokens)
        chi_square = np.sum((np.bincount(tokens, minlength=5) - expected) ** 2 / expected)
        assert chi_square < 23.5, previous  # four degrees of freedom: p = 1e-4
    chosen = np.log(probabilities[1])[first]
    np.testing.assert_allclose(found.logprobs[:, 0], chosen, atol=1e-5)


def test_draws_are_uniform_and_independent_over_positions():
    draws = np.stack([uniforms(request_seeds((1,), 20_000), position) for position in range(4)])
    assert draws.min() >= 0 and draws.max() < 1
    np.testing.assert_allclose(
        np.quantile(draws, [0.1, 0.5, 0.9], axis=1), [[0.1] * 4, [0.5] * 4, [0.9] * 4], atol=0.01
    )
    correlation = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlation).max() < 0.03
    consecutive = np.stack([uniforms(np.arange(20_000, dtype=np.uint64), position) for position in range(2)])
    assert (
        abs(np.corrcoef(consecutive)[0, 1]) < 0.03
        and abs(np.corrcoef(consecutive[0, 1:], consecutive[0, :-1])[0, 1]) < 0.03
    )


def test_a_response_does_not_depend_on_its_batch(model, prompts, monkeypatch):
    """Nor on the requests that leave the batch early: a batch of one never loses a row before it ends."""
    seeds, kept, select = request_seeds((2,), len(prompts)), [], DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda *a: (kept.append(len(a[1])), select(*a))[1])
    sample(model, prompts, seeds)
    assert len(kept) > 1 and 60 > kept[0] > kept[-1] > 0  # rows do leave early, more than once
    alone = [sample(model, [prompt], seeds[i : i + 1])[0] for i, prompt in enumerate(prompts)]
    for batch_size, order in (
        (60, np.arange(60)),
        (60, np.arange(60)[::-1]),
        (7, np.random.default_rng(0).permutation(60)),
    ):
        found = sample(model, [prompts[i] for i in order], seeds[order], batch_size=batch_size)
        for position, i in enumerate(order):
            assert found[position].token_ids == alone[i].token_ids
            assert found[position].finish_reason == alone[i].finish_reason
            assert found[position].seed == int(seeds[i])
            np.testing.assert_allclose(found[position].logprobs, alone[i].logprobs, atol=1e-5)


def test_another_seed_gives_another_response(model, prompts):
    a, b = (sample(model, prompts, request_seeds((seed,), len(prompts))) for seed in (3, 4))
    assert np.mean([x.token_ids != y.token_ids for x, y in zip(a, b, strict=True)]) > 0.9
    same_prompt = sample(model, prompts[:1] * 40, request_seeds((5,), 40))
    assert len({completion.token_ids for completion in same_prompt}) > 30


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_equal_a_plain_forward_pass(model, prompts, temperature):
    """One sequence at a time without padding; in the batch, prompts are padded on the left. Greedy is stated at 1."""
    assert len(set(map(len, prompts))) > 3
    found = sample(model, prompts, request_seeds((6,), len(prompts)), temperature=temperature)
    for prompt, completion in zip(prompts, found, strict=True):
        logprobs = tiny.full_logprobs(model, [*prompt, *completion.token_ids], temperature or 1.0)[len(prompt) - 1 :]
        expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)
        if temperature == 0:
            assert completion.token_ids == tuple(logprobs.argmax(-1).tolist())


def test_greedy_equals_transformers_generate(model, prompts):
    found = sample(model, prompts, request_seeds((7,), len(prompts)), temperature=0.0)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert list(completion.token_ids) == expected[0, len(prompt) :].tolist()


def test_finish_reasons_and_lengths(model, prompts):
    found = sample(model, prompts, request_seeds((8,), len(prompts)))
    assert 0 < found.finished.sum() < len(prompts)
    for i, completion in enumerate(found):
        length = len(completion.token_ids)
        assert length == found.lengths[i] == len(completion.logprobs)
        assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == EOS_ID) == found.finished[i]
        assert EOS_ID not in completion.token_ids[:-1]
        assert completion.finish_reason == "stop" or length == 16
        assert (found.ids[i, length:] == PAD_ID).all() and (found.logprobs[i, length:] == 0).all()
    assert isinstance(found[0], Completion) and len(found) == len(list(found)) == len(prompts)


def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch):
    """A token of probability 0 is never drawn, neither first nor last in the vocabulary."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2)
    monkeypatch.setattr(hf, "uniforms", lambda seeds, step: np.array([0.0, 1 - 2.0**-53]))
    token, logprob = hf._draw(logits, 1.0, SEEDS, 0)
    assert token.tolist() == [1, 2]
    np.testing.assert_allclose(logprob, np.log(0.5), rtol=1e-6)


def test_end_of_sequence_at_once_and_all_at_the_same_step():
    """A response of the end-of-sequence token alone has length 1, and a batch that ends together stops there."""
    model = markov()
    with torch.no_grad():
        model.lm_head.weight.zero_()[2, :5] = 25.0
    found = sample(model, [[1], [1, 3]], request_seeds((9,), 2), 8)
    assert found.lengths.tolist() == [1, 1] and found.finished.all()
    assert found.ids.tolist() == [[2] + [0] * 7] * 2


def test_seeds_are_a_function_of_the_entropy():
    np.testing.assert_array_equal(request_seeds((1, 2), 5), request_seeds((1, 2), 9)[:5])
    assert len({*request_seeds((1, 2), 1000), *request_seeds((1, 3), 1000), *request_seeds((2, 1), 1000)}) == 3000


SEEDS = request_seeds((0,), 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [], "seeds": SEEDS[:0]}, "prompts: none"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1], [1] * (CONTEXT - 3)]}, rf"prompts\[1\] has {CONTEXT - 3} tokens.*max_new_tokens=4"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"temperature": -0.5}, "temperature: -0.5"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"seeds": SEEDS[:1]}, r"seeds: need uint64 \[2\], got uint64 \[1\]"),
        ({"seeds": SEEDS.astype(np.int64)}, "seeds: need uint64.* got int64"),
    ],
)
def test_bad_input_is_named(model, change, message):
    arguments = {"prompts": [[1], [1, 3]], "seeds": SEEDS, "max_new_tokens": 4, "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        hf.sample(model, arguments.pop("prompts"), **arguments)
