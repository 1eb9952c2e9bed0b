"""The outcome reward model: loss and accuracy by brute force, where the score is read, saving, and what it learns."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from transformers import AutoModelForSequenceClassification

import tiny
from rlhfscale import lm, models
from rlhfscale.data import Responses
from rlhfscale.data.demonstrations import token_ids
from rlhfscale.ladder import EOS_ID, PAD_ID
from rlhfscale.rewards import outcome

GOLD = np.array([[1.0, 0.5, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 1.0, 1.0, 0.3]], np.float32)
SCORES = np.array([[0.3, 0.3, -1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [-0.5, 0.0, 0.7, 0.7]], np.float32)


def ordered_pairs():
    """(prompt, better, worse) over every prompt's responses."""
    for prompt, row in enumerate(GOLD):
        for i, j in itertools.permutations(range(len(row)), 2):
            if row[i] > row[j]:
                yield prompt, i, j


def test_bradley_terry_equals_a_loop_over_pairs():
    losses = [math.log1p(math.exp(-(SCORES[p, i] - SCORES[p, j]).item())) for p, i, j in ordered_pairs()]
    assert len(losses) == 10
    found = outcome.bradley_terry(torch.from_numpy(SCORES), torch.from_numpy(GOLD))
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_bradley_terry_of_two_responses_is_the_pairwise_loss():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.5, 0.5])
    found = outcome.bradley_terry(torch.stack([rejected, chosen], 1), torch.tensor([[0.0, 1.0]] * 2))
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(chosen - rejected).mean())


def test_bradley_terry_raises_the_better_score():
    scores = torch.zeros(1, 2, requires_grad=True)
    outcome.bradley_terry(scores, torch.tensor([[1.0, 0.0]])).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([[-0.5, 0.5]]))


def test_pair_accuracy_equals_a_loop_over_pairs():
    right = {0: [], 1: [], 2: []}
    for p, i, j in ordered_pairs():
        right[p].append(1.0 if SCORES[p, i] > SCORES[p, j] else 0.5 if SCORES[p, i] == SCORES[p, j] else 0.0)
    found = outcome.pair_accuracy(SCORES, GOLD)
    assert np.isnan(found[1]) and not right[1]  # all gold equal
    np.testing.assert_allclose(found[[0, 2]], [np.mean(right[0]), np.mean(right[2])])
    np.testing.assert_allclose(outcome.pair_accuracy(GOLD, GOLD)[[0, 2]], 1.0)
    np.testing.assert_allclose(outcome.pair_accuracy(-GOLD, GOLD)[[0, 2]], 0.0)
    np.testing.assert_allclose(outcome.pair_accuracy(np.zeros_like(GOLD), GOLD)[[0, 2]], 0.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.save_model(tiny.model(), folder)
    return folder


def scorer(base, seed=0):
    """A scorer with a random head, so that scores differ."""
    model = models.load_scorer(base, init_seed=seed)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def test_scores_equal_transformers_sequence_classification(base, tmp_path):
    models.save_model(scorer(base), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    documents = tiny.documents(30)
    ids = torch.from_numpy(documents.ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0].numpy()
    found = outcome.score_sequences(scorer(base), documents.ids, documents.lengths)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scores_do_not_depend_on_padding_or_batch(base):
    model, documents = scorer(base), tiny.documents(30)
    expected = outcome.score_sequences(model, documents.ids, documents.lengths)
    alone = [
        outcome.score_sequences(model, documents.ids[i : i + 1, : documents.lengths[i]], documents.lengths[i : i + 1])
        for i in range(30)
    ]
    wide = np.pad(documents.ids, ((0, 0), (0, 11)))
    order = np.random.default_rng(0).permutation(30)
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=1e-5)
    np.testing.assert_allclose(outcome.score_sequences(model, wide, documents.lengths, 7), expected, atol=1e-5)
    shuffled = outcome.score_sequences(model, documents.ids[order], documents.lengths[order], batch_size=4)
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-5)


def test_the_score_is_read_at_the_end_of_sequence_token(base):
    model, documents = scorer(base), tiny.documents(30)
    last = documents.lengths - 1
    rows = np.arange(30)
    assert (documents.ids[rows, last] == EOS_ID).all()
    seen = []
    hook = model.score.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    expected = outcome.last_token_scores(model, documents.ids, documents.lengths).detach().numpy()
    hook.remove()
    ids = torch.from_numpy(documents.ids)
    with torch.no_grad():
        hidden = model.model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).last_hidden_state
    torch.testing.assert_close(seen[0], hidden[rows, last])  # of the last token only: one row for each sequence
    changed = documents.ids.copy()
    changed[rows, last] = token_ids()["a"]
    assert (np.abs(outcome.score_sequences(model, changed, documents.lengths) - expected) > 1e-4).all()


def test_a_new_scorer_scores_everything_alike(base):
    documents = tiny.documents(10)
    found = outcome.score_sequences(models.load_scorer(base, init_seed=0), documents.ids, documents.lengths)
    np.testing.assert_array_equal(found, np.zeros(10))


def test_a_saved_reward_model_is_the_same(base, tmp_path):
    model, documents = scorer(base), tiny.documents(30)
    expected = outcome.score_sequences(model, documents.ids, documents.lengths)
    models.save_model(model, tmp_path)
    (tmp_path / "scale.json").write_text(json.dumps({"mean": 0.5, "std": 2.0}))
    loaded = outcome.OutcomeRewardModel.load(tmp_path)
    assert tiny.equal(tiny.weights(loaded.model), tiny.weights(model))
    # not to the last bit: kernels depend on where a weight lies in memory
    np.testing.assert_allclose(loaded.score(documents.ids, documents.lengths), expected, rtol=1e-5, atol=1e-6)
    normalised = loaded.score(documents.ids, documents.lengths, normalise=True)
    np.testing.assert_allclose(normalised, (expected - 0.5) / 2.0, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def planted(num_prompts, seed, samples=4):
    """Responses of random letters whose gold is the share of the letter a in them."""
    rng = np.random.default_rng(seed)
    letters = np.array([token_ids()[letter] for letter in "abcd"])
    prompts = tiny.prompts(num_prompts, seed)
    lengths = rng.integers(4, 8, (num_prompts, samples))
    ids = letters[rng.integers(4, size=(num_prompts, samples, 8))]
    gold = np.zeros((num_prompts, samples), np.float32)
    for p, s in np.ndindex(gold.shape):
        gold[p, s] = np.mean(ids[p, s, : lengths[p, s] - 1] == letters[0])
        ids[p, s, lengths[p, s] - 1 :] = PAD_ID
        ids[p, s, lengths[p, s] - 1] = EOS_ID
    zeros = np.zeros(gold.shape, np.int8)
    return Responses(
        prompt_ids=lm.pad(prompts), prompt_lengths=np.array([len(prompt) for prompt in prompts]), response_ids=ids,
        response_lengths=lengths, finished=np.ones(gold.shape, bool), gold=gold, exact=gold == 1, steps_right=zeros,
        steps_written=zeros, family=zeros[:, 0], difficulty=zeros[:, 0],
    )  # fmt: skip


def accuracy(model, responses):
    ids, lengths = responses.sequences()
    scores = outcome.score_sequences(model, ids.reshape(-1, ids.shape[2]), lengths.reshape(-1))
    return np.nanmean(outcome.pair_accuracy(scores.reshape(lengths.shape), responses.gold))


def train(model, lora_rank, data=None, **options):
    settings = {"epochs": 3, "prompts_per_batch": 16, "lr": 1e-2, "muon_lr": 1e-2, "seed": (0,)} | options
    return outcome.train(model, data or [planted(200, 0), planted(120, 1)], lora_rank=lora_rank, **settings)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_learns_a_planted_preference(base, lora_rank):
    model, records = train(models.load_scorer(base, init_seed=0), lora_rank)
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0]["accuracy"] == 0.5  # the head starts as zero
    assert accuracy(model, planted(100, 2)) > 0.9
    assert records[-1]["accuracy"] > 0.85
    assert not model.training and not any("lora" in name for name, _ in model.named_parameters())


def test_adapters_leave_the_trunk_alone_until_they_are_folded_in(base, monkeypatch, tmp_path):
    at_the_end, merge = {}, LoraModel.merge_and_unload

    def spy(self, *args, **options):
        at_the_end.update(tiny.weights(self.model))
        return merge(self, *args, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", spy)
    before = tiny.weights(models.load_scorer(base, init_seed=0))
    model, _ = train(models.load_scorer(base, init_seed=0), lora_rank=4, epochs=1)
    trunk = {name.replace(".base_layer", ""): w for name, w in at_the_end.items() if "lora" not in name}
    trunk = {name: w for name, w in trunk.items() if not name.startswith("score")}
    assert tiny.equal(trunk, {name: w for name, w in before.items() if not name.startswith("score")})
    assert all(w.abs().max() > 0 for name, w in at_the_end.items() if "lora_B" in name)
    after = tiny.weights(model)
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight") or name == "score.weight"}
    # the trained head, kept by `modules_to_save`, is the one that is saved
    models.save_model(model, tmp_path)
    documents = tiny.documents(20)
    expected = outcome.score_sequences(model, documents.ids, documents.lengths)
    assert expected.std() > 1e-3
    found = outcome.score_sequences(models.load_scorer(tmp_path), documents.ids, documents.lengths)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_is_decided_by_its_seed(base, lora_rank):
    data = [planted(40, 0)]
    runs = [
        tiny.weights(train(models.load_scorer(base, init_seed=0), lora_rank, data, epochs=1, seed=(seed,))[0])
        for seed in (0, 0, 1)
    ]
    assert tiny.equal(runs[0], runs[1]) and not tiny.equal(runs[0], runs[2])


def test_a_batch_holds_each_informative_prompt_once_per_epoch():
    data = [planted(37, 0), planted(20, 1)]
    data[0].gold[:5] = 0.5  # nothing to compare
    seen = []
    for ids, lengths, gold in outcome._batches(data, 8, np.random.default_rng(0)):
        assert ids.shape[0] == lengths.shape[0] == gold.size and len(gold) <= 8
        assert (ids[np.arange(len(ids)), lengths - 1] == EOS_ID).all()
        seen += [tuple(row) for row in gold]
    informative = [tuple(row) for responses in data for row in responses.gold if row.max() > row.min()]
    assert sorted(seen) == sorted(informative) and len(seen) < 53


def test_divergence_names_the_step(base):
    model = models.load_scorer(base, init_seed=0)
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(lm.Diverged, match="step 0: reward-model loss is nan"):
        train(model, 0, [planted(10, 0)])


def test_data_without_a_comparison_is_refused(base):
    data = planted(10, 0)
    data.gold[:] = 0.5
    with pytest.raises(ValueError, match="no prompt .* unequal gold"):
        train(models.load_scorer(base, init_seed=0), 0, [data])
