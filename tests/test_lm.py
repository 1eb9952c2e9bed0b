"""The language-model loop: its loss against transformers' own, batches, divergence, determinism."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import tiny
from rlhfscale.bed import tasks
from rlhfscale.bed.demonstrations import demonstration_nats, demonstrations, problem_list
from rlhfscale.bed.responses import decode
from rlhfscale.models import lm
from rlhfscale.models.documents import bucketed_batches


def train(model, documents, seed=(0,), **options):
    settings = {"batch_size": 8, "lr": 3e-3, "muon_lr": 5e-3, "skip_prompt": True} | options
    return lm.train(model, documents, seed=seed, **settings)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_response_loss_equals_transformers_with_masked_labels(skip_prompt):
    model, documents = tiny.model(), tiny.documents(12)
    index = np.array([3, 0, 7, 11, 5])
    ids = torch.from_numpy(documents.ids[index])
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, i in enumerate(index):
        mask[row, : documents.lengths[i]] = 1
        start = documents.prompt_lengths[i] if skip_prompt else 0
        labels[row, start : documents.lengths[i]] = ids[row, start : documents.lengths[i]]
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    found = lm.response_loss(model, documents, index, skip_prompt)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_loss_does_not_depend_on_padding():
    model, documents = tiny.model(), tiny.documents(12)
    index = np.argsort(documents.lengths)[:4]
    wide = dataclasses.replace(documents, ids=np.pad(documents.ids, ((0, 0), (0, 9))))
    losses = [lm.response_loss(model, wide, np.array([i]), True).item() for i in (*index, documents.lengths.argmax())]
    tokens = (documents.lengths - documents.prompt_lengths)[[*index, documents.lengths.argmax()]]
    together = lm.response_loss(model, wide, np.array([*index, documents.lengths.argmax()]), True).item()
    assert together == pytest.approx(np.average(losses, weights=tokens), rel=1e-5)


def test_document_losses_are_sums_over_response_tokens():
    model, documents = tiny.model(), tiny.documents(13)
    found = lm.document_losses(model, documents, batch_size=4)
    for i in range(len(documents)):
        ids, start = documents.ids[i, : documents.lengths[i]], documents.prompt_lengths[i]
        logprobs = tiny.full_logprobs(model, ids)
        expected = -sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids)))
        assert found[i] == pytest.approx(expected, rel=1e-5)
    responses = (documents.lengths - documents.prompt_lengths).sum()
    together = lm.response_loss(model, documents, np.arange(13), skip_prompt=True).item()
    assert found.sum() / responses == pytest.approx(together, rel=1e-5)


def test_batches_cover_each_document_once():
    lengths = np.random.default_rng(0).integers(5, 30, size=1003)
    batches = list(bucketed_batches(lengths, 8, np.random.default_rng(1)))
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert max(map(len, batches)) == 8
    spread = np.mean([np.ptp(lengths[batch]) for batch in batches])
    assert spread < 0.2 * np.mean([np.ptp(lengths[i : i + 8]) for i in range(0, 1000, 8)])
    means = [lengths[batch].mean() for batch in batches]
    assert np.corrcoef(means, np.arange(len(means)))[0, 1] < 0.3  # batches come in no order of length


def test_divergence_names_the_step_and_the_metric():
    model = tiny.model()

    def poison(step, num_steps, tokens):
        if step == 1:
            model.lm_head.weight.data[0, 0] = float("nan")

    with pytest.raises(lm.Diverged, match="step 2: loss is nan"):
        train(model, tiny.documents(40), on_step=poison)


def test_a_gradient_that_is_not_finite_is_named_before_it_moves_anything():
    model = tiny.model()
    before = tiny.weights(model)
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(lm.Diverged, match="step 0: gradient norm is (nan|inf)"):
        train(model, tiny.documents(8))
    assert tiny.equal(before, tiny.weights(model))


def test_training_learns_and_is_decided_by_its_seed():
    runs = []
    for seed in ((0,), (0,), (1,)):
        model = tiny.model(scale=1.0)
        losses = train(model, tiny.documents(480), seed=seed)
        runs.append(tiny.weights(model))
        assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5
        assert not model.training
    assert tiny.equal(runs[0], runs[1])
    assert not tiny.equal(runs[0], runs[2])


def test_every_parameter_is_trained_by_one_optimizer():
    model = tiny.model()
    before = tiny.weights(model)
    held = [id(p) for o in lm.optimizers(model, 1e-3, 1e-3) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    train(model, tiny.documents(64))
    assert not any(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_steps_and_tokens_are_reported():
    seen, documents = [], tiny.documents(20)
    train(tiny.model(), documents, on_step=lambda *report: seen.append(report))
    assert [report[:2] for report in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[-1][2] == documents.lengths.sum()


def test_learning_rate_rises_holds_and_falls_to_zero():
    factors = [lm.warmup_stable_decay(step, 1000) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 50) and factors[49] == factors[599] == 1.0
    assert factors[800] == pytest.approx(0.5) and factors[999] == pytest.approx(1 / 400)


def test_demonstrators_own_loss_is_that_of_their_minds_and_slips():
    """By hand for chains of one operation, where a mind is one choice; the tests of tasks look at longer ones."""
    slip, documents = 0.1, demonstrations((3, 1), "train", tuple(tasks.FAMILIES), 400, 0.1)
    nats = demonstration_nats(documents, slip)
    looked_at = 0
    for row, problem in enumerate(problem_list((3, 1, 0), "train", tuple(tasks.FAMILIES), 400)):
        if problem.difficulty > 1:
            continue
        family, (name,) = tasks.FAMILIES[problem.family], problem.operations
        text = decode(documents.ids[row, documents.prompt_lengths[row] : documents.lengths[row]])
        written, share = tuple(text.split()), family.misconceptions[name].share
        chance = 0.0
        for weight, meant in ((1 - share, problem.states[0]), (share, family.misconceptions[name].rule(problem.start))):
            if len(meant) == len(written):
                hits = [slip / (len(family.alphabet) - 1) if a != b else 1 - slip for a, b in zip(meant, written)]  # noqa: B905
                chance += weight * math.prod(hits)
        assert nats[row] == pytest.approx(-math.log(chance))
        looked_at += 1
    assert looked_at > 100


def test_a_document_that_nobody_writes_is_named():
    documents = demonstrations((3, 1), "train", tuple(tasks.FAMILIES), 200, 0.1)
    with pytest.raises(ValueError, match=r"document \d+: no demonstrator writes '.+' with slip = 0"):
        demonstration_nats(documents, 0.0)
    assert (demonstration_nats(demonstrations((3, 1), "train", tuple(tasks.FAMILIES), 50, 0.0), 0.0) >= 0).all()
