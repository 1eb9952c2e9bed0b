"""The outcome reward model: loss and accuracy by brute force, where the score is read, saving, and what it learns."""

import itertools
import math

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraModel
from transformers import AutoModelForSequenceClassification

import tiny
from rlhfscale import lm, models
from rlhfscale.data.demonstrations import token_ids
from rlhfscale.data.documents import Documents, pad
from rlhfscale.data.responses import Responses
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


def scores_of(model, documents, readout="last", **options):
    reward = outcome.OutcomeRewardModel(model, readout)
    return reward.score(documents.ids, documents.prompt_lengths, documents.lengths, **options)


def subset(documents, index, width=None):
    padded = np.pad(documents.ids, ((0, 0), (0, 20)))[index, : width or documents.ids.shape[1]]
    return Documents(padded, documents.lengths[index], documents.prompt_lengths[index])


READOUTS = pytest.mark.parametrize("readout", ["last", "sum"])


def test_scores_equal_transformers_sequence_classification(base, tmp_path):
    models.save_model(scorer(base), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    documents = tiny.documents(30)
    ids = torch.from_numpy(documents.ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0].numpy()
    found = scores_of(scorer(base), documents)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@READOUTS
def test_the_score_is_read_at_the_end_of_sequence_or_over_the_response(base, readout):
    """Against the head applied by hand to one sequence at a time, without padding."""
    model, documents = scorer(base), tiny.documents(30)
    rows, last = np.arange(30), documents.lengths - 1
    assert (documents.ids[rows, last] == EOS_ID).all()
    found = scores_of(model, documents, readout)
    for i in range(30):
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(documents.ids[i : i + 1, : documents.lengths[i]])).last_hidden_state
            by_token = hidden[0] @ model.score.weight[0]
        expected = by_token[-1] if readout == "last" else by_token[documents.prompt_lengths[i] :].sum()
        assert found[i] == pytest.approx(expected.item(), abs=2e-5)
    changed = documents.ids.copy()
    changed[rows, last] = token_ids()["a"]
    other = scores_of(model, Documents(changed, documents.lengths, documents.prompt_lengths), readout)
    assert (np.abs(other - found) > 1e-4).all()


@READOUTS
def test_scores_do_not_depend_on_padding_or_batch(base, readout):
    model, documents = scorer(base), tiny.documents(30)
    expected = scores_of(model, documents, readout)
    alone = [scores_of(model, subset(documents, [i], documents.lengths[i]), readout)[0] for i in range(30)]
    np.testing.assert_allclose(alone, expected, atol=2e-5)
    wide = subset(documents, np.arange(30), documents.ids.shape[1] + 11)
    np.testing.assert_allclose(scores_of(model, wide, readout, batch_size=7), expected, atol=2e-5)
    order = np.random.default_rng(0).permutation(30)
    shuffled = scores_of(model, subset(documents, order), readout, batch_size=4)
    np.testing.assert_allclose(shuffled, expected[order], atol=2e-5)


def test_a_new_scorer_scores_everything_alike(base):
    assert not scores_of(models.load_scorer(base, init_seed=0), tiny.documents(10)).any()


@READOUTS
def test_a_saved_reward_model_is_the_same(base, tmp_path, readout):
    model, documents = scorer(base), tiny.documents(30)
    reward = outcome.OutcomeRewardModel(model, readout)
    expected = scores_of(model, documents, readout)
    reward.calibrate(expected)
    reward.save(tmp_path)
    loaded = outcome.OutcomeRewardModel.load(tmp_path)
    assert tiny.equal(tiny.weights(loaded.model), tiny.weights(model))
    assert (loaded.readout, loaded.mean, loaded.std) == (readout, reward.mean, reward.std)
    sequences = documents.ids, documents.prompt_lengths, documents.lengths
    # not to the last bit: kernels depend on where a weight lies in memory
    np.testing.assert_allclose(loaded.score(*sequences), expected, rtol=1e-5, atol=1e-5)
    normalised = loaded.score(*sequences, normalise=True)
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(normalised, (expected - expected.mean()) / expected.std(), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_number_of_pairs():
    assert outcome.num_pairs(GOLD) == len(list(ordered_pairs())) == 10


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
        prompt_ids=pad(prompts), prompt_lengths=np.array([len(prompt) for prompt in prompts]), response_ids=ids,
        response_lengths=lengths, finished=np.ones(gold.shape, bool), gold=gold, exact=gold == 1, steps_right=zeros,
        steps_written=zeros, family=zeros[:, 0], difficulty=zeros[:, 0],
    )  # fmt: skip


def train(model, lora_rank, data=None, readout="last", **options):
    settings = {"epochs": 3, "prompts_per_batch": 16, "lr": 1e-2, "muon_lr": 1e-2, "seed": (0,)} | options
    data = data or [planted(200, 0), planted(120, 1)]
    return outcome.train(model, data, lora_rank=lora_rank, readout=readout, **settings)


@READOUTS
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_learns_a_planted_preference(base, lora_rank, readout):
    model, records = train(models.load_scorer(base, init_seed=0), lora_rank, readout=readout)
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0]["accuracy"] == 0.5  # the head starts as zero
    held_out = planted(100, 2)
    scores = outcome.OutcomeRewardModel(model, readout).score_responses(held_out)
    assert np.nanmean(outcome.pair_accuracy(scores, held_out.gold)) > 0.9
    assert records[-1]["accuracy"] > 0.85
    assert not model.training and not any("lora" in name for name, _ in model.named_parameters())


@READOUTS
def test_score_responses_scores_prompt_and_response(base, readout):
    model, responses = scorer(base), planted(6, 5)
    found = outcome.OutcomeRewardModel(model, readout).score_responses(responses)
    for p, s in np.ndindex(found.shape):
        prompt = responses.prompt_ids[p, : responses.prompt_lengths[p]].tolist()
        sequence = prompt + responses.response_ids[p, s, : responses.response_lengths[p, s]].tolist()
        one = Documents(np.array([sequence]), np.array([len(sequence)]), np.array([len(prompt)]))
        assert found[p, s] == pytest.approx(scores_of(model, one, readout)[0], abs=2e-5)


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
    expected = scores_of(model, documents)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores_of(models.load_scorer(tmp_path), documents), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_is_decided_by_its_seed(base, lora_rank):
    data = [planted(40, 0)]
    runs = [
        tiny.weights(train(models.load_scorer(base, init_seed=0), lora_rank, data, epochs=1, seed=(seed,))[0])
        for seed in (0, 0, 1)
    ]
    assert tiny.equal(runs[0], runs[1]) and not tiny.equal(runs[0], runs[2])


def repeated(num_prompts, seed):
    """Responses of which every prompt's third is its first again."""
    data = planted(num_prompts, seed)
    for array in (data.response_ids, data.response_lengths, data.gold, data.exact):
        array[:, 2] = array[:, 0]
    return data


@READOUTS
def test_equal_responses_have_equal_scores(base, readout):
    data = repeated(20, 3)
    scores = outcome.OutcomeRewardModel(scorer(base), readout).score_responses(data)
    np.testing.assert_array_equal(scores[:, 2], scores[:, 0])
    ids, lengths = data.sequences()
    prompts = np.repeat(data.prompt_lengths, 4)
    plain = outcome.sequence_scores(scorer(base), ids.reshape(80, -1), prompts, lengths.reshape(-1), readout)
    np.testing.assert_allclose(scores.reshape(-1), plain.detach(), atol=2e-5)


def test_training_on_equal_responses_counts_each_of_them(base):
    """Its first step's gradient against one without sharing their computation."""
    data, model, seen = repeated(8, 3), scorer(base), []
    ids, lengths = data.sequences()
    prompts = np.repeat(data.prompt_lengths, 4)
    scores = outcome.sequence_scores(model, ids.reshape(32, -1), prompts, lengths.reshape(-1), "last").view(8, 4)
    loss = outcome.bradley_terry(scores, torch.from_numpy(data.gold))
    (expected,) = torch.autograd.grad(loss, model.score.weight)
    model.score.weight.register_hook(seen.append)
    train(model, 0, [data], epochs=1, prompts_per_batch=8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-5)


def test_a_batch_holds_each_informative_prompt_once_per_epoch():
    data = [planted(37, 0), planted(20, 1)]
    data[0].gold[:5] = 0.5  # nothing to compare
    seen = []
    for ids, prompt_lengths, lengths, gold in outcome._batches(data, 8, np.random.default_rng(0)):
        assert ids.shape[0] == prompt_lengths.size == lengths.size == gold.size and len(gold) <= 8
        assert (ids[np.arange(len(ids)), prompt_lengths - 1] == token_ids()["="]).all()
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
