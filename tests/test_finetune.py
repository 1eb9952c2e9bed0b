"""Supervised fine-tuning of an adapter, against transformers' own loss."""

import numpy as np
import pytest
import torch

import tiny_rl
from rlhfscale.chat.finetune import finetune, response_loss
from rlhfscale.models.sequences import Sequences
from rlhfscale.rl import networks


def sequences(count=6, seed=0):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 40, rng.integers(2, 8)).tolist() for _ in range(count)]
    responses = [rng.integers(3, 40, rng.integers(1, 6)).tolist() for _ in range(count)]
    return Sequences.join(prompts * 2, responses + responses[::-1], np.ones(2 * count, bool))


def test_the_loss_and_its_gradients_are_those_of_transformers_and_peft():
    data = sequences()
    ours = tiny_rl.randomise(networks.build(tiny_rl.language_model(), critic="none", rank=4))
    loss = response_loss(ours, data)
    loss.backward()
    found = tiny_rl.gradients(ours)
    ours.zero_grad()
    labels = torch.from_numpy(data.ids).clone()
    column = np.arange(labels.shape[1])
    labels[torch.from_numpy((column < data.prompt_lengths[:, None]) | (column >= data.lengths[:, None]))] = -100
    with ours.as_peft("policy") as model:
        expected = model(input_ids=torch.from_numpy(data.ids), labels=labels, use_cache=False).loss
        expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert tiny_rl.relative(found, tiny_rl.gradients(ours)) < 1e-4


def test_it_learns_and_repeats():
    def run():
        ours = networks.build(tiny_rl.language_model(), critic="none", rank=4)
        return finetune(ours, sequences(), epochs=20, batch_size=4, lr=3e-3, seed=(0,))

    losses = run()
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    assert run() == losses


def test_nothing_to_learn_from_is_refused():
    ours = networks.build(tiny_rl.language_model(), critic="none", rank=4)
    with pytest.raises(ValueError, match="no sequences"):
        finetune(ours, sequences()[np.zeros(0, int)], epochs=1, batch_size=4, lr=1e-3, seed=(0,))
