"""The process reward model: where steps end, what is read there, its aggregates, labels, training and saving."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel

import tiny
from rlhfscale.bed import labels, rungs, tasks
from rlhfscale.bed.demonstrations import encode, encode_prompts, problem_list, token_ids
from rlhfscale.bed.ladder import EOS_ID
from rlhfscale.bed.responses import label
from rlhfscale.models import lm, loading
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import OutcomeRewardModel, ProcessRewardModel, StepLabelled, labelled, process, scorer
from rlhfscale.samplers.base import Completions
from tiny_rewards import byte_scorer, byte_tokenizer, padded, random_head, used_weights

TOKENIZER = rungs.build_tokenizer()
STEP_IDS = labels.step_ids()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rungs.save_model(tiny.model(), folder)
    return folder


def new_scorer(base):
    return random_head(loading.load_scorer(base, init_seed=0))


def written(*responses, prompt="lists reverse rotate sort : b d a ="):
    """Sequences of responses; a full stop stands for the end-of-sequence token."""
    head = TOKENIZER(prompt).input_ids
    finished = np.array([response.endswith(".") for response in responses])
    tails = [encode(response.strip(".")) + [EOS_ID] * response.endswith(".") for response in responses]
    return Sequences.join([head] * len(tails), tails, finished, TOKENIZER)


RESPONSES = ["a d b ; d b a ; a b d .", "a d b .", "a d b ; d b", "a d b ;", "; .", "."]
NUM_STEPS = [3, 1, 2, 1, 2, 1]


def test_steps_end_at_separators_and_at_the_end():
    data = written(*RESPONSES)
    ends = labelled.step_ends(data, STEP_IDS)
    assert ends.sum(1).tolist() == NUM_STEPS
    start = int(data.prompt_lengths[0])
    found = [(np.flatnonzero(row) - start).tolist() for row in ends]
    assert found == [[3, 7, 11], [3], [3, 5], [3], [0, 1], [0]]
    assert data.ids[0, start + 3] == token_ids()[";"] and data.ids[0, start + 11] == EOS_ID


def test_a_separator_in_the_prompt_ends_no_step():
    data = written("a b .", prompt="lists ; reverse : b a =")
    assert labelled.step_ends(data, STEP_IDS).sum() == 1


def test_step_scores_are_read_at_step_ends(base):
    """Against the head applied by hand to one sequence at a time, without padding."""
    model, data = new_scorer(base), written(*RESPONSES)
    found = ProcessRewardModel(model, TOKENIZER, STEP_IDS).step_scores(data)
    assert [len(steps) for steps in found] == NUM_STEPS
    for row, steps in enumerate(found):
        with torch.no_grad():
            ids = torch.from_numpy(data.ids[row : row + 1, : data.lengths[row]])
            logits = model.score(model.model(ids).last_hidden_state)[0, :, 0]
        expected = torch.sigmoid(logits[torch.from_numpy(labelled.step_ends(data, STEP_IDS)[row, : len(logits)])])
        np.testing.assert_allclose(steps, expected, atol=1e-5)
    assert np.concatenate(found).std() > 0.05


class Stated(ProcessRewardModel):
    """Says given probabilities."""

    def step_scores(self, sequences):
        return [np.array([0.9, 0.2, 0.5]), np.array([0.7]), np.array([0.5, 0.5])]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("last", [0.5, 0.7, 0.5]), ("min", [0.2, 0.7, 0.5]), ("product", [0.09, 0.7, 0.25])],
)
def test_aggregates_by_hand(base, aggregate, expected):
    found = Stated(new_scorer(base), TOKENIZER, STEP_IDS, aggregate).score(None)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_scores_aggregate_the_steps(base):
    data = written(*RESPONSES)
    model = new_scorer(base)
    steps = ProcessRewardModel(model, TOKENIZER, STEP_IDS).step_scores(data)
    for aggregate, combine in (("last", lambda p: p[-1]), ("min", min), ("product", math.prod)):
        found = ProcessRewardModel(model, TOKENIZER, STEP_IDS, aggregate).score(data)
        np.testing.assert_allclose(found, [combine(p.tolist()) for p in steps], rtol=1e-5)
        assert ((found >= 0) & (found <= 1)).all()


def test_scores_do_not_depend_on_padding_or_batch(base):
    data = written(*RESPONSES)
    reward = ProcessRewardModel(new_scorer(base), TOKENIZER, STEP_IDS, "product")
    expected = reward.score(data)
    np.testing.assert_allclose([reward.score(data[[i]])[0] for i in range(6)], expected, atol=1e-5)
    for pad_id in (EOS_ID, STEP_IDS[0], 10**6):  # no step ends in the padding, whatever stands there
        np.testing.assert_allclose(reward.score(padded(data, 40, pad_id)), expected, atol=1e-5)
    reward.tokens_per_micro_batch = 25
    order = np.array([3, 0, 5, 1, 0, 2, 4])
    np.testing.assert_allclose(reward.score(data[order]), expected[order], atol=1e-5)


def test_no_sequences_and_empty_responses(base):
    reward, data = ProcessRewardModel(new_scorer(base), TOKENIZER, STEP_IDS), written(*RESPONSES)
    assert reward.score(data[np.array([], int)]).shape == (0,)
    data.lengths[2] = data.prompt_lengths[2]
    with pytest.raises(ValueError, match="response 2 is empty"):
        reward.score(data)


def test_another_tokenizer_gets_the_text_and_ends_steps_by_its_own_tokens():
    tokenizer = byte_tokenizer()
    model, data = byte_scorer(tokenizer), written(*RESPONSES[:3])
    step_ids = process.find_step_ids(tokenizer, ";")
    assert step_ids == (tokenizer.get_vocab()[";"],)
    found = ProcessRewardModel(model, tokenizer, step_ids, "product").score(data)
    assert found.std() > 1e-3
    again = labelled.encode(tokenizer, data.prompts, data.responses, data.finished)
    np.testing.assert_allclose(found, ProcessRewardModel(model, None, step_ids, "product").score(again), atol=1e-6)
    steps = ProcessRewardModel(model, tokenizer, step_ids).step_scores(data)
    assert [len(p) for p in steps] == NUM_STEPS[:3]


def test_finding_the_tokens_that_close_a_step():
    assert process.find_step_ids(TOKENIZER, ";") == STEP_IDS == (token_ids()[";"],)
    names = token_ids()
    assert process.find_step_ids(TOKENIZER, "swap") == tuple(names[name] for name in names if "swap" in name)
    with pytest.raises(ValueError, match="no token of the tokenizer holds '\\|'"):
        process.find_step_ids(TOKENIZER, "|")


PROBLEM = tasks.Problem("lists", ("reverse", "rotate"), ("b", "d", "a"), (("a", "d", "b"), ("d", "b", "a")))


def completions(*responses):
    """Completions as a sampler returns them; a full stop stands for the end-of-sequence token."""
    ids = [encode(response.strip(".")) + [EOS_ID] * response.endswith(".") for response in responses]
    lengths = np.array([len(row) for row in ids])
    array = np.zeros((len(ids), lengths.max()), np.int32)
    for row, values in zip(array, ids, strict=True):
        row[: len(values)] = values
    finished = np.array([response.endswith(".") for response in responses])
    return Completions(array, lengths, finished, np.zeros(array.shape, np.float32), 1.0, np.zeros(len(ids), np.uint64))


def test_labels_by_hand():
    """A slip in the first step leaves the second right if it follows; a third step is one too many; and a response cut
    at a separator or within a step."""
    nan = np.nan
    found = {
        "a d b ; d b a .": [1, 1, nan],
        "a d d ; d d a .": [0, 1, nan],
        "a d b ; d b b .": [1, 0, nan],
        "a d b ; d b a ; a .": [1, 1, 0],
        "a d b ;": [1, nan, nan],
        "a d b ; .": [1, 0, nan],
        "a d b ; d b": [1, 0, nan],
        "a d .": [0, nan, nan],
    }
    data = labels.steps_of_completions([PROBLEM], completions(*found), TOKENIZER)
    np.testing.assert_array_equal(data.labels, np.array(list(found.values()), np.float32))
    assert data.sequences.responses[0] == "a d b ; d b a" and data.sequences.tokenizer is TOKENIZER
    assert data.sequences.prompts[0] == PROBLEM.prompt
    assert data.sequences.finished.tolist() == [text.endswith(".") for text in found]


def sampled(num_problems, seed, samples=2, slip=0.3):
    """Problems with demonstrators' responses to them, slips included, as completions."""
    rng = np.random.default_rng(seed)
    problems = problem_list((seed, 5), "train", tiny.FAMILIES, num_problems)
    texts = [tasks.FAMILIES[p.family].demonstrate(p, rng, slip) for p in problems for _ in range(samples)]
    return problems, completions(*(f"{text} ." for text in texts))


def test_labels_equal_the_verifiers_steps():
    problems, samples = sampled(30, 0)
    data = labels.steps_of_completions(problems, samples)
    responses = label(problems, samples)
    np.testing.assert_array_equal(np.nansum(data.labels, 1), responses.steps_right.reshape(-1))
    np.testing.assert_array_equal((~np.isnan(data.labels)).sum(1), responses.steps_written.reshape(-1))
    same = labels.steps_of_responses(problems, responses)
    np.testing.assert_array_equal(same.labels, data.labels)
    np.testing.assert_array_equal(same.sequences.ids, data.sequences.ids[:, : same.sequences.ids.shape[1]])
    assert data.sequences.ids[2, 1 : data.sequences.prompt_lengths[2]].tolist() == encode_prompts(problems)[1][1:]
    with pytest.raises(ValueError, match="60 responses are not a whole number of samples to each of 7 problems"):
        labels.steps_of_completions(problems[:7], samples)


def train(model, data, lora_rank=0, **options):
    settings = {"epochs": 3, "responses_per_batch": 32, "lr": 1e-2, "muon_lr": 1e-2, "seed": (0,)} | options
    return process.train(model, data, step_ids=STEP_IDS, lora_rank=lora_rank, **settings)


def planted(count, seed, steps=3):
    """Steps of random letters; a step is right if it holds the letter a."""
    rng = np.random.default_rng(seed)
    texts, labels = [], np.full((count, steps + 1), np.nan, np.float32)
    for row in range(count):
        parts = [rng.choice(list("abcd"), 3) for _ in range(rng.integers(1, steps + 1))]
        texts.append(" ; ".join(" ".join(part) for part in parts) + " .")
        labels[row, : len(parts)] = ["a" in part for part in parts]
    return StepLabelled(written(*texts), labels)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_learns_which_steps_are_right(base, lora_rank):
    model, records = train(loading.load_scorer(base, init_seed=0), [planted(500, 0)], lora_rank)
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0].keys() == {"step", "loss", "accuracy"}
    assert records[-1]["accuracy"] > 0.9
    held_out = planted(200, 1)
    steps = ProcessRewardModel(model, TOKENIZER, STEP_IDS).step_scores(held_out.sequences)
    probabilities, truth = np.concatenate(steps), held_out.labels[~np.isnan(held_out.labels)]
    assert ((probabilities > 0.5) == truth).mean() > 0.9
    lowest = ProcessRewardModel(model, TOKENIZER, STEP_IDS, "min").score(held_out.sequences)
    assert ((lowest > 0.5) == (np.nanmin(held_out.labels, 1) == 1)).mean() > 0.85
    assert not model.training and not any("lora" in name for name, _ in model.named_parameters())


def test_noisy_labels_give_calibrated_probabilities(base):
    """A step with the letter a is right with probability 0.8, another with 0.3."""
    data, held_out = planted(800, 0), planted(400, 1)
    for part, seed in ((data, 2), (held_out, 3)):
        draws = np.random.default_rng(seed).random(part.labels.shape)
        part.labels[:] = np.where(np.isnan(part.labels), np.nan, draws < np.where(part.labels == 1, 0.8, 0.3))
    model, _ = train(loading.load_scorer(base, init_seed=0), [data], lora_rank=4, epochs=2)
    probabilities = np.concatenate(ProcessRewardModel(model, TOKENIZER, STEP_IDS).step_scores(held_out.sequences))
    excess, decile = probabilities - held_out.labels[~np.isnan(held_out.labels)], np.int64(probabilities * 10)
    expected_error = np.abs(np.bincount(decile, excess)).sum() / len(excess)  # Guo et al. 2017
    assert expected_error < 0.08 and probabilities.std() > 0.15


def test_the_loss_is_the_mean_over_labelled_steps(base):
    """Of the first batch, by hand from the probabilities that the model states before it is trained."""
    data = planted(12, 0)
    data.labels[3, 0] = np.nan  # not labelled
    steps = ProcessRewardModel(new_scorer(base), TOKENIZER, STEP_IDS).step_scores(data.sequences)
    nats, right = [], []
    for probabilities, row in zip(steps, data.labels, strict=True):
        for probability, truth in zip(probabilities, row, strict=False):
            if not np.isnan(truth):
                nats.append(-math.log(probability if truth else 1 - probability))
                right.append((probability > 0.5) == truth)
    for tokens in (10**6, 40):
        _, records = train(new_scorer(base), [data], epochs=1, tokens_per_micro_batch=tokens)
        assert len(records) == 1
        assert records[0]["loss"] == pytest.approx(np.mean(nats), rel=1e-4)
        assert records[0]["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(
    "option",
    [{"epochs": 2}, {"responses_per_batch": 8}, {"lr": 3e-3}, {"muon_lr": 3e-3}, {"lora_rank": 2}, {"seed": (1,)}],
)
def test_every_option_changes_what_is_learned(base, option):
    data = [planted(64, 0)]
    runs = []
    for options in ({}, option):
        model, _ = train(new_scorer(base), data, **({"epochs": 1} | options))
        runs.append(ProcessRewardModel(model, TOKENIZER, STEP_IDS).score(data[0].sequences))
    assert np.abs(runs[0] - runs[1]).max() > 1e-4


def test_responses_without_labels_are_left_out(base):
    data = planted(20, 0)
    data.labels[::2] = np.nan
    seen = list(process.batches_of([data], 4, np.random.default_rng(0)))
    assert sum(len(batch) for batch in seen) == 10
    assert all((~np.isnan(batch.labels)).any(1).all() for batch in seen)


@pytest.mark.parametrize("merge", [False, True])
def test_a_saved_process_reward_model_is_the_same(base, tmp_path, merge):
    start = loading.load_scorer(base, init_seed=0)
    start.name_or_path = start.config.name_or_path = str(base)
    model, _ = train(start, [planted(64, 0)], lora_rank=2, merge=False)
    reward, data = ProcessRewardModel(model, TOKENIZER, STEP_IDS, "min"), written(*RESPONSES)
    expected = reward.score(data)
    reward.calibrate(expected)
    reward.save(tmp_path, merge=merge)
    loaded = ProcessRewardModel.load(tmp_path)
    assert (loaded.step_ids, loaded.aggregate) == (STEP_IDS, "min")
    assert (loaded.mean, loaded.std) == (reward.mean, reward.std)
    assert isinstance(loaded.model, PeftModel) != merge
    if merge:
        np.testing.assert_allclose(loaded.score(data), expected, rtol=1e-4, atol=1e-5)
    else:
        plain = PeftModel.from_pretrained(loading.load_scorer(base, init_seed=9), tmp_path)
        assert tiny.equal(used_weights(plain), used_weights(model))
        np.testing.assert_array_equal(loaded.score(data), expected)
    found = loaded.normalised().score(data)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)


def test_one_kind_of_reward_model_is_not_loaded_as_the_other(base, tmp_path):
    ProcessRewardModel(new_scorer(base), TOKENIZER, STEP_IDS).save(tmp_path / "process")
    OutcomeRewardModel(new_scorer(base), TOKENIZER).save(tmp_path / "outcome")
    with pytest.raises(ValueError, match="holds no OutcomeRewardModel"):
        OutcomeRewardModel.load(tmp_path / "process")
    with pytest.raises(ValueError, match="holds no ProcessRewardModel"):
        ProcessRewardModel.load(tmp_path / "outcome")


def test_a_bfloat16_model_is_trained_and_scored(base):
    model = loading.load_base(base, "bf16", head="score", local_files_only=True)
    model, records = train(random_head(model), [planted(64, 0)], lora_rank=2, merge=False)
    found = ProcessRewardModel(model, TOKENIZER, STEP_IDS).score(written(*RESPONSES))
    assert np.isfinite([record["loss"] for record in records]).all() and found.std() > 1e-3
    assert next(scorer.trunk_and_head(model)[0].parameters()).dtype == torch.bfloat16


def test_bad_options_and_labels_are_refused(base, monkeypatch):
    model, data = new_scorer(base), planted(6, 0)
    with pytest.raises(ValueError, match="aggregate: 'mean' is not one of 'last', 'min', 'product'"):
        ProcessRewardModel(model, TOKENIZER, STEP_IDS, "mean")
    with pytest.raises(ValueError, match="step_ids: name at least one"):
        ProcessRewardModel(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="labels: sample 4 has"):
        StepLabelled(data.sequences, np.where(np.arange(6)[:, None] == 4, 0.5, data.labels))
    with pytest.raises(ValueError, match="labels have shape"):
        StepLabelled(data.sequences, data.labels[:2])
    monkeypatch.setattr(model.model, "forward", lambda *args, **options: pytest.fail("computed"))
    too_many = data.labels.copy()
    too_many[2, 3] = 1
    with pytest.raises(ValueError, match="response 2 has labels for more than its . steps"):
        train(model, [StepLabelled(data.sequences, too_many)])
    with pytest.raises(ValueError, match="no step has a label"):
        train(model, [StepLabelled(data.sequences, data.labels * np.nan)])
    with pytest.raises(ValueError, match="responses_per_batch: 0 is below 1"):
        train(model, [data], responses_per_batch=0)
    with pytest.raises(ValueError, match="muon_lr: needed"):
        train(model, [data], muon_lr=None)
    with pytest.raises(ValueError, match="step_ids: name at least one"):
        process.train(model, [data], step_ids=(), epochs=1, responses_per_batch=4, lr=1e-3, lora_rank=0, seed=(0,))


def test_divergence_names_the_step(base):
    model = new_scorer(base)
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(lm.Diverged, match="step 0: reward-model loss is nan"):
        train(model, [planted(6, 0)])
