"""Equal prompts computed once: the same states, gradients and training as sequence by sequence."""

import numpy as np
import pytest
import torch

import tiny_rl
from rlhfscale.models import packing
from rlhfscale.models.loading import CRITIC, POLICY
from rlhfscale.rl import GRPO, PPO, networks
from rlhfscale.rl.networks import REFERENCE


def sequences(prompts=4, responses=6, seed=0, longest=9):
    """Shuffled sequences: ids padded with 7, prompt lengths, lengths; the responses to a prompt differ in length."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(prompts):
        prompt = rng.integers(3, 40, rng.integers(5, 12)).tolist()
        rows += [(prompt, rng.integers(3, 40, rng.integers(1, longest + 1)).tolist()) for _ in range(responses)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([p + r + [7] * (width - len(p) - len(r)) for p, r in rows])
    return ids, torch.tensor([len(p) for p, _ in rows]), torch.tensor([len(p) + len(r) for p, r in rows])


def test_every_token_is_found_where_source_says():
    ids, prompt_lengths, lengths = sequences()
    packed = packing.pack(ids, prompt_lengths, lengths)
    assert len(packed.ids) == 4
    for row in range(len(ids)):
        source = packed.source[row, : lengths[row]]
        assert torch.equal(packed.ids.flatten()[source], ids[row, : lengths[row]])
        assert torch.equal(packed.position.flatten()[source], torch.arange(int(lengths[row])))
        assert (packed.segment.flatten()[source] == 0).tolist() == [
            c < int(prompt_lengths[row]) for c in range(int(lengths[row]))
        ]


def test_a_token_sees_its_own_sequence_so_far_and_nothing_else():
    ids, prompt_lengths, lengths = sequences()
    packed = packing.pack(ids, prompt_lengths, lengths)
    visible = packing.bias(packed.segment, torch.float32) == 0
    width = packed.ids.shape[1]
    for row in range(len(ids)):
        source = packed.source[row, : lengths[row]].tolist()
        for place, at in enumerate(source):
            seen = visible[at // width, at % width].nonzero().flatten() + at // width * width
            assert seen.tolist() == sorted(source[: place + 1])


def test_it_packs_only_where_that_saves_enough(monkeypatch):
    ids, prompt_lengths, lengths = sequences(prompts=8, responses=1)
    assert packing.pack(ids, prompt_lengths, lengths) is None
    one_twice = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    assert packing.pack(ids[one_twice], prompt_lengths[one_twice], lengths[one_twice]) is None
    ids, prompt_lengths, lengths = sequences()
    monkeypatch.setattr(packing, "WIDEST", 40)
    narrow = packing.pack(ids, prompt_lengths, lengths)
    assert narrow.ids.shape[1] <= 40
    assert len(narrow.ids) > 4


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("role", [POLICY, CRITIC, REFERENCE])
def test_states_and_gradients_are_those_of_each_sequence_alone(kind, role):
    ids, prompt_lengths, lengths = sequences()
    model = networks.build(tiny_rl.language_model(kind, num_key_value_heads=2), critic="separate", rank=4)
    tiny_rl.randomise(model)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    slope = torch.randn(int(real.sum()), 32, generator=torch.Generator().manual_seed(1))

    def run(read):
        model.zero_grad()
        states = read()
        if role != REFERENCE:
            (states * slope).sum().backward()
        return states.detach(), tiny_rl.gradients(model)

    assert packing.pack(ids, prompt_lengths, lengths) is not None
    expected, by_sequence = run(lambda: model.hidden(ids, role)[real])
    found, shared = run(lambda: model.hidden_at(ids, real, role, prompt_lengths, lengths))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if role != REFERENCE:
        assert tiny_rl.relative(shared, by_sequence) < 1e-5


@pytest.mark.parametrize("a_part", [0, 5, 10**9])
@pytest.mark.parametrize("tokens", [1, 30, 10**9])
def test_no_cheaper_cuts_exist(tokens, a_part):
    """Against every way to cut items in the order of their widths."""
    rng = np.random.default_rng(0)

    def cost(parts):
        return sum(len(part) * widths[part].max() + a_part for part in parts)

    def fits(part):
        return len(part) == 1 or len(part) * widths[part].max() <= tokens

    for _ in range(20):
        widths = rng.integers(1, 9, 8)
        found = packing.cut(widths, tokens, a_part)
        order = np.concatenate(found)
        np.testing.assert_array_equal(widths[order], np.sort(widths))
        assert sorted(order) == list(range(8)) and all(map(fits, found))
        ways = (np.split(order, [i for i in range(1, 8) if way >> (i - 1) & 1]) for way in range(2**7))
        least = min(cost(parts) for parts in ways if all(map(fits, parts)))
        # a width is split only where it exceeds the limit: where parts are dear, that can take one more than the least
        assert least <= cost(found) <= least + (a_part if (tokens, a_part) == (30, 10**9) else 0)


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_training_is_the_same(algorithm, monkeypatch):
    def trained():
        run = tiny_rl.trainer(algorithm, responses_per_prompt=8, minibatch_size=64)
        return tiny_rl.updates(run, 2)

    packs = []
    original = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *a: packs.append(original(*a)) or packs[-1])
    shared = trained()
    assert any(pack is not None for pack in packs)
    monkeypatch.setattr(packing, "pack", lambda *a: None)
    for found, expected in zip(shared, trained(), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
