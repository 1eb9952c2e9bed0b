"""The outcome reward model: where the score is read, padding, other tokenizers, saving, training, what it learns."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

import tiny
from rlhfscale.bed import labels, rungs
from rlhfscale.bed.demonstrations import token_ids
from rlhfscale.bed.ladder import EOS_ID, PAD_ID
from rlhfscale.bed.responses import Responses
from rlhfscale.models import lm, loading
from rlhfscale.models.documents import pad
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import Labelled, Normalised, OutcomeRewardModel, conversations, labelled, losses, outcome, scorer
from tiny_rewards import LLAMA_LIKE, SMALL, byte_scorer, byte_tokenizer, padded, random_head, used_weights

TOKENIZER = rungs.build_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rungs.save_model(tiny.model(), folder)
    return folder


def new_scorer(base, seed=0):
    return random_head(loading.load_scorer(base, init_seed=seed), seed)


def sequences(count, seed=0, tokenizer=None):
    documents = tiny.documents(count, seed)
    fields = documents.ids, documents.prompt_lengths, documents.lengths
    return Sequences(*fields, np.ones(count, bool), tokenizer)


def scores_of(model, data, readout="last", **options):
    return OutcomeRewardModel(model, None, readout, **options).score(data)


READOUTS = pytest.mark.parametrize("readout", ["last", "sum"])


def test_scores_equal_transformers_sequence_classification(base, tmp_path):
    rungs.save_model(new_scorer(base), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    data = sequences(30)
    ids = torch.from_numpy(data.ids)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0].numpy()
    found = scores_of(new_scorer(base), data)
    assert found.std() > 0.1 and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


FAMILIES = {
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL)),
    "qwen2": lambda: Qwen2ForSequenceClassification(Qwen2Config(**LLAMA_LIKE)),
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA_LIKE)),
    "gpt_neox": lambda: GPTNeoXForSequenceClassification(
        GPTNeoXConfig(**{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"})
    ),
    "opt": lambda: OPTForSequenceClassification(
        OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            word_embed_proj_dim=32, **SMALL,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_decoder_with_a_score_head_is_scored_and_trained(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    random_head(model)
    data = sequences(20)
    ids = torch.from_numpy(data.ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0].numpy()
    found = scores_of(model, data)
    assert found.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=2e-5)
    trained, records = train(model, 2, [planted(12, 0)], epochs=2, prompts_per_batch=4)
    assert np.isfinite([record["loss"] for record in records]).all()
    assert np.abs(scores_of(trained, data) - found).max() > 1e-3


def test_models_without_a_single_score_are_refused(base):
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1)
    with pytest.raises(ValueError, match="BertForSequenceClassification has no decoder with a head `score`"):
        OutcomeRewardModel(BertForSequenceClassification(bert))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no decoder with a head `score`"):
        OutcomeRewardModel(tiny.model())
    two = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(ValueError, match="2 outputs; load it with num_labels=1"):
        train(two, 0)


@READOUTS
def test_the_score_is_read_at_the_end_of_sequence_or_over_the_response(base, readout):
    """Against the head applied by hand to one sequence at a time, without padding."""
    model, data = new_scorer(base), sequences(30)
    rows, last = np.arange(30), data.lengths - 1
    assert (data.ids[rows, last] == EOS_ID).all()
    found = scores_of(model, data, readout)
    for i in range(30):
        with torch.no_grad():
            hidden = model.model(torch.from_numpy(data.ids[i : i + 1, : data.lengths[i]])).last_hidden_state
            by_token = hidden[0] @ model.score.weight[0]
        expected = by_token[-1] if readout == "last" else by_token[data.prompt_lengths[i] :].sum()
        assert found[i] == pytest.approx(expected.item(), abs=2e-5)
    changed = data.ids.copy()
    changed[rows, last] = token_ids()["a"]
    other = scores_of(model, Sequences(changed, data.prompt_lengths, data.lengths, data.finished), readout)
    assert (np.abs(other - found) > 1e-4).all()


@READOUTS
def test_scores_do_not_depend_on_padding_or_batch(base, readout):
    model, data = new_scorer(base), sequences(30)
    expected = scores_of(model, data, readout)
    alone = [scores_of(model, data[[i]], readout)[0] for i in range(30)]
    assert data[[int(data.lengths.argmin())]].ids.shape[1] < data.ids.shape[1]
    np.testing.assert_allclose(alone, expected, atol=2e-5)
    for pad_id in (PAD_ID, EOS_ID, token_ids()["a"], 10**6, -100):  # beyond the vocabulary too: it is never looked at
        wide = padded(data, data.ids.shape[1] + 11, pad_id)
        np.testing.assert_allclose(scores_of(model, wide, readout, tokens_per_micro_batch=90), expected, atol=2e-5)
    order = np.random.default_rng(0).permutation(30)
    shuffled = scores_of(model, data[order], readout, tokens_per_micro_batch=70)
    np.testing.assert_allclose(shuffled, expected[order], atol=2e-5)


@READOUTS
def test_a_tokenizer_whose_pad_is_its_end_of_sequence(base, readout):
    """As SmolLM2's: the end of sequence is still read, where transformers' own pooling would skip it."""
    tokenizer = rungs.build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model, data = new_scorer(base), sequences(30)
    with_pad_eos = padded(data, data.ids.shape[1] + 3, EOS_ID)
    expected = scores_of(model, data, readout)
    reward = OutcomeRewardModel(model, tokenizer, readout)
    np.testing.assert_allclose(reward.score(with_pad_eos), expected, atol=2e-5)
    texts = labelled.encode(tokenizer, *texts_of(data), data.finished)
    assert (texts.ids[np.arange(30), texts.lengths - 1] == EOS_ID).all()
    np.testing.assert_allclose(reward.score(texts), expected, atol=2e-5)


def texts_of(data):
    data = Sequences(data.ids, data.prompt_lengths, data.lengths, data.finished, TOKENIZER)
    return data.prompts, data.responses


def made_of(prompts, lengths):
    """Sequences of one token each, by the number of their prompt, and their whole lengths."""
    return Sequences.join(
        [[3 + prompt] * 2 for prompt in prompts],
        [[3] * (length - 2) for length in lengths],
        np.ones(len(lengths), bool),
    )


def test_micro_batches_hold_similar_lengths_and_few_tokens():
    lengths = np.random.default_rng(0).integers(3, 40, 200)
    data = made_of(np.arange(200), lengths)
    batches = list(scorer.micro_batches(data, 100))
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(200))
    sizes = [len(batch) * lengths[batch].max() for batch in batches]
    assert max(sizes) <= 100 and len(batches) > 30
    assert (np.diff(lengths[np.concatenate(batches)]) >= 0).all()
    assert [len(batch) for batch in scorer.micro_batches(data, 1)] == [1] * 200


def test_micro_batches_keep_responses_to_one_prompt_together():
    prompts = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 6))
    data = made_of(prompts, np.random.default_rng(1).integers(3, 6, 120))
    for tokens in (40, 200, 10**6):
        batches = list(scorer.micro_batches(data, tokens))
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(120))
        assert sum(len(set(prompts[batch])) for batch in batches) == 20


def test_micro_batches_compute_less_padding(base, monkeypatch):
    model, data, computed = new_scorer(base), sequences(60), []
    monkeypatch.setattr(scorer.llama, "form_of", lambda model: None)  # its layers cut by themselves
    monkeypatch.setattr(model.model, "forward", spy(model.model.forward, computed))
    for tokens in (10**6, 200):
        computed.clear()
        scores_of(model, data, tokens_per_micro_batch=tokens)
        if tokens == 200:
            assert len(computed) > 3 and max(computed) <= 200
            assert data.lengths.sum() <= sum(computed) < 1.1 * data.lengths.sum()
        else:
            assert len(computed) < 4 and sum(computed) < data.ids.size and data.ids.size > 1.3 * data.lengths.sum()


def spy(forward, computed):
    def wrapped(*args, **options):
        assert "attention_mask" not in options
        computed.append(options["input_ids"].numel())
        return forward(*args, **options)

    return wrapped


@READOUTS
@pytest.mark.parametrize("lora_rank", [0, 3])
def test_micro_batched_loss_and_gradients_equal_the_full_batchs(base, readout, lora_rank):
    data = labels.labelled(planted(12, 0))
    model = scorer.prepare(new_scorer(base), lora_rank, False, np.random.default_rng(0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    results = []
    for tokens in (10**6, 150, 1):
        scores = outcome.sequence_scores(model, data.sequences, readout, tokens)
        gold, group = torch.from_numpy(data.gold), torch.from_numpy(data.group)
        loss = losses.multitask(scores, gold, torch.from_numpy(data.correct), group=group, centring_weight=0.1)
        model.zero_grad(set_to_none=True)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    assert any("lora_A" in name for name in results[0][1]) == bool(lora_rank)
    for loss, grads in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert grads.keys() == results[0][1].keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(
                gradient, results[0][1][name], rtol=1e-3, atol=1e-5 * results[0][1][name].abs().max().item() + 1e-6
            )


def test_a_new_scorer_scores_everything_alike(base):
    assert not scores_of(loading.load_scorer(base, init_seed=0), sequences(10)).any()


def test_no_sequences_have_no_scores(base):
    assert scores_of(new_scorer(base), sequences(3)[np.array([], int)]).shape == (0,)


def test_an_empty_response_is_named(base):
    data = sequences(5)
    data.lengths[3] = data.prompt_lengths[3]
    with pytest.raises(ValueError, match="response 3 is empty"):
        scores_of(new_scorer(base), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "mean"}, "readout: 'mean' is not one of 'last', 'sum'"),
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch: 0 is below 1"),
        ({"std": 0.0}, "same score"),
        ({"mean": float("nan")}, "must be finite"),
    ],
)
def test_bad_options_are_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        OutcomeRewardModel(new_scorer(base), **options)


def test_a_reward_model_that_says_nothing_is_not_calibrated(base):
    reward = OutcomeRewardModel(loading.load_scorer(base, init_seed=0))
    with pytest.raises(ValueError, match="the same score"):
        reward.calibrate(reward.score(sequences(10)))


@READOUTS
def test_a_saved_reward_model_is_the_same(base, tmp_path, readout):
    model, data = new_scorer(base), sequences(30)
    reward = OutcomeRewardModel(model, TOKENIZER, readout)
    expected = reward.score(data)
    reward.calibrate(expected)
    reward.save(tmp_path)
    loaded = OutcomeRewardModel.load(tmp_path)
    assert tiny.equal(tiny.weights(loaded.model), tiny.weights(model))
    assert (loaded.readout, loaded.mean, loaded.std) == (readout, reward.mean, reward.std)
    assert loaded.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    # not to the last bit: kernels depend on where a weight lies in memory
    np.testing.assert_allclose(loaded.score(data), expected, rtol=1e-5, atol=1e-5)
    normalised = loaded.normalised()
    assert isinstance(normalised, Normalised) and (normalised.mean, normalised.std) == (reward.mean, reward.std)
    found = normalised.score(data)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(found, (expected - expected.mean()) / expected.std(), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_folder_without_a_tokenizer_is_loaded_without(base, tmp_path):
    OutcomeRewardModel(new_scorer(base)).save(tmp_path)
    assert OutcomeRewardModel.load(str(tmp_path)).tokenizer is None


def test_a_bare_model_folder_is_no_reward_model(base):
    with pytest.raises(ValueError, match="holds no OutcomeRewardModel; make one of a bare model by"):
        OutcomeRewardModel.load(base)


@pytest.fixture(scope="module")
def adapted(base):
    """A reward model with trained adapters, not merged."""
    model = loading.load_scorer(base, init_seed=0)
    model.name_or_path = model.config.name_or_path = str(base)
    return train(model, 4, [planted(60, 0)], readout="sum", merge=False)[0]


def test_adapters_are_saved_as_a_plain_peft_folder_with_their_head(base, adapted, tmp_path):
    data = sequences(30)
    reward = OutcomeRewardModel(adapted, TOKENIZER, "sum")
    assert isinstance(adapted, PeftModel)
    expected = reward.score(data)
    assert expected.std() > 1e-2
    reward.calibrate(expected)
    reward.save(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "reward.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and not any(file.is_dir() for file in tmp_path.iterdir())
    plain = PeftModel.from_pretrained(loading.load_scorer(base, init_seed=3), tmp_path)
    assert tiny.equal(used_weights(plain), used_weights(adapted))
    np.testing.assert_array_equal(scores_of(plain, data, "sum"), expected)
    loaded = OutcomeRewardModel.load(tmp_path)  # the base is found where the adapters say
    assert tiny.equal(used_weights(loaded.model), used_weights(adapted))
    np.testing.assert_array_equal(loaded.score(data), expected)
    assert (loaded.readout, loaded.mean, loaded.std) == ("sum", reward.mean, reward.std)
    given = OutcomeRewardModel.load(tmp_path, loading.load_scorer(base, init_seed=4))
    np.testing.assert_array_equal(given.score(data), expected)


def test_transformers_own_forward_pass_of_the_peft_folder_scores_the_same(base, tmp_path):
    model = loading.load_scorer(base, init_seed=0)
    trained, _ = train(model, 4, [planted(60, 0)], merge=False)
    data = sequences(30)
    reward = OutcomeRewardModel(trained)
    reward.save(tmp_path)
    plain = PeftModel.from_pretrained(loading.load_scorer(base, init_seed=3), tmp_path).eval()
    ids = torch.from_numpy(data.ids)
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0].numpy()
    np.testing.assert_allclose(theirs, reward.score(data), rtol=1e-4, atol=1e-5)


def test_adapters_are_merged_on_request(adapted, tmp_path):
    data, reward = sequences(30), OutcomeRewardModel(adapted, TOKENIZER, "sum")
    expected, before = reward.score(data), tiny.weights(adapted)
    reward.save(tmp_path, merge=True)
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "adapter_config.json").exists()
    loaded = OutcomeRewardModel.load(tmp_path)
    assert not isinstance(loaded.model, PeftModel)
    np.testing.assert_allclose(loaded.score(data), expected, rtol=1e-4, atol=1e-4)
    assert tiny.equal(tiny.weights(adapted), before)  # the model that was saved still has its adapters


def test_an_adapter_of_any_name_is_saved_into_the_folder_itself(base, tmp_path):
    config = loading.lora_config(2, 4.0)
    config.modules_to_save = ["score"]
    model = PeftModel(new_scorer(base), config, adapter_name="judge")
    expected = scores_of(model, sequences(10))
    OutcomeRewardModel(model).save(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "judge").exists()
    np.testing.assert_array_equal(OutcomeRewardModel.load(tmp_path, new_scorer(base, 5)).score(sequences(10)), expected)


def test_a_base_is_of_one_reward_model_only(base, adapted, tmp_path):
    OutcomeRewardModel(adapted, TOKENIZER, "sum").save(tmp_path)
    shared = new_scorer(base)
    OutcomeRewardModel.load(tmp_path, shared)
    for use in (lambda: OutcomeRewardModel.load(tmp_path, shared), lambda: train(shared, 2), lambda: train(shared, 0)):
        with pytest.raises(ValueError, match="carries the adapters of another model already"):
            use()


def test_adapters_whose_base_is_gone_ask_for_it(base, adapted, tmp_path):
    OutcomeRewardModel(adapted, TOKENIZER, "sum").save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "some-model"))
    with pytest.raises(ValueError, match="no base is at 'some-model'; give load"):
        OutcomeRewardModel.load(tmp_path)


@READOUTS
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_another_tokenizer_gets_the_text(readout, pad_is_eos):
    """The scores of the texts encoded by hand: begin-of-sequence, prompt, response, end-of-sequence if it was there."""
    tokenizer = byte_tokenizer(pad_is_eos)
    model, data = byte_scorer(tokenizer), sequences(12, tokenizer=TOKENIZER)
    data.finished[:] = np.arange(12) % 3 > 0
    data.lengths[~data.finished] -= 1
    reward = OutcomeRewardModel(model, tokenizer, readout)
    found = reward.score(data)
    assert found.std() > 0.1
    for i in range(12):
        prompt = [0, *tokenizer(data.prompts[i], add_special_tokens=False).input_ids]
        response = tokenizer(data.responses[i], add_special_tokens=False).input_ids + [1] * bool(data.finished[i])
        assert tokenizer.decode(response, skip_special_tokens=True) == data.responses[i]
        one = Sequences.join([prompt], [response], data.finished[[i]])
        assert found[i] == pytest.approx(scores_of(model, one, readout)[0], abs=2e-5)
    unfinished = Sequences(data.ids, data.prompt_lengths, data.lengths, np.zeros(12, bool), TOKENIZER)
    assert (np.abs(reward.score(unfinished) - found)[data.finished] > 1e-4).all()


def test_equal_tokenizers_pass_the_ids_through(base, monkeypatch):
    other = rungs.build_tokenizer()
    other.pad_token = other.eos_token  # padding is never looked at
    model, data = new_scorer(base), sequences(10, tokenizer=other)
    expected = scores_of(new_scorer(base), sequences(10))
    monkeypatch.setattr(Sequences, "_text", lambda *args: pytest.fail("the ids were decoded"))
    for tokenizer in (TOKENIZER, None, other):
        np.testing.assert_array_equal(OutcomeRewardModel(model, tokenizer).score(data), expected)
    np.testing.assert_array_equal(OutcomeRewardModel(model, TOKENIZER).score(sequences(10)), expected)


def test_which_tokenizers_are_equal():
    swapped = rungs.build_tokenizer()
    swapped.eos_token = "="
    assert conversations.same_tokens(TOKENIZER, rungs.build_tokenizer())
    assert not conversations.same_tokens(TOKENIZER, swapped)
    assert not conversations.same_tokens(TOKENIZER, byte_tokenizer())


def test_texts_that_cannot_be_encoded_are_named():
    with pytest.raises(ValueError, match="sample 1 holds a symbol"):
        labelled.encode(TOKENIZER, ["lists =", "lists ="], ["a", "a xylophone"], np.ones(2, bool))
    with pytest.raises(ValueError, match="response 1 is empty"):
        labelled.encode(TOKENIZER, ["lists =", "lists ="], ["a", ""], np.zeros(2, bool))
    assert labelled.encode(TOKENIZER, ["lists ="], [""], np.ones(1, bool)).lengths.tolist() == [4]
    no_end = byte_tokenizer()
    no_end.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        labelled.encode(no_end, ["a"], ["b"], np.ones(1, bool))


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt():
    closing = byte_tokenizer()
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    found = labelled.encode(closing, ["ab"], ["c"], np.ones(1, bool))
    np.testing.assert_array_equal(found.ids, labelled.encode(byte_tokenizer(), ["ab"], ["c"], np.ones(1, bool)).ids)


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
        response_lengths=lengths, finished=np.ones(gold.shape, bool), gold=gold, exact=gold > 0.3, steps_right=zeros,
        steps_written=zeros, family=zeros[:, 0], difficulty=zeros[:, 0],
    )  # fmt: skip


def train(model, lora_rank, data=None, readout="last", **options):
    settings = {"epochs": 3, "prompts_per_batch": 16, "lr": 1e-2, "muon_lr": 1e-2, "seed": (0,)} | options
    data = data or [planted(200, 0), planted(120, 1)]
    data = [labels.labelled(part) if isinstance(part, Responses) else part for part in data]
    return outcome.train(model, data, lora_rank=lora_rank, readout=readout, **settings)


@READOUTS
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_learns_a_planted_preference(base, lora_rank, readout):
    model, records = train(loading.load_scorer(base, init_seed=0), lora_rank, readout=readout)
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0]["accuracy"] == 0.5  # the head starts as zero
    assert records[0].keys() == {"step", "loss", "accuracy"}
    held_out = planted(100, 2)
    scores = labels.scores_of(OutcomeRewardModel(model, None, readout), held_out)
    assert np.nanmean(outcome.pair_accuracy(scores, held_out.gold)) > 0.9
    assert records[-1]["accuracy"] > 0.85
    assert not model.training and not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_learns_planted_correctness(base, lora_rank):
    model, records = train(loading.load_scorer(base, init_seed=0), lora_rank, loss="pointwise")
    assert records[0]["loss"] == pytest.approx(math.log(2)) and records[0].keys() == {"step", "loss", "accuracy"}
    held_out = planted(100, 2)
    scores = labels.scores_of(OutcomeRewardModel(model), held_out)
    assert ((scores > 0) == held_out.exact).mean() > 0.9
    assert records[-1]["accuracy"] > 0.85


def test_training_on_both_tasks_in_one_batch_learns_both(base):
    """Half of the prompts have comparisons only, the other half correctness only."""
    compared, graded = (labels.labelled(planted(160, seed)) for seed in (0, 1))
    compared = Labelled(compared.sequences, compared.group, compared.gold, np.full(640, np.nan, np.float32))
    graded = Labelled(graded.sequences, graded.group, np.full(640, np.nan, np.float32), graded.correct)
    data = Labelled.concat([compared, graded])
    assert len(np.unique(data.group)) == 320
    model, records = train(loading.load_scorer(base, init_seed=0), 0, [data], loss="both")
    assert records[0].keys() == {"step", "loss", "accuracy", "label_accuracy"}
    assert records[0]["loss"] == pytest.approx(2 * math.log(2))
    held_out = planted(100, 2)
    scores = labels.scores_of(OutcomeRewardModel(model), held_out)
    assert np.nanmean(outcome.pair_accuracy(scores, held_out.gold)) > 0.9
    assert ((scores > 0) == held_out.exact).mean() > 0.85


def test_data_sets_of_one_task_each_are_trained_in_turn(base):
    compared, graded = (labels.labelled(planted(16, seed)) for seed in (0, 1))
    compared = Labelled(compared.sequences, compared.group, compared.gold, np.full(64, np.nan, np.float32))
    graded = Labelled(graded.sequences, graded.group, np.full(64, np.nan, np.float32), graded.correct)
    _, records = train(loading.load_scorer(base, init_seed=0), 0, [compared, graded], loss="both", epochs=1)
    found = {(math.isnan(record["accuracy"]), math.isnan(record["label_accuracy"])) for record in records}
    assert found == {(True, False), (False, True)}


@READOUTS
def test_score_responses_scores_prompt_and_response(base, readout):
    model, responses = new_scorer(base), planted(6, 5)
    found = labels.scores_of(OutcomeRewardModel(model, TOKENIZER, readout), responses)
    for p, s in np.ndindex(found.shape):
        prompt = responses.prompt_ids[p, : responses.prompt_lengths[p]].tolist()
        response = responses.response_ids[p, s, : responses.response_lengths[p, s]].tolist()
        one = Sequences.join([prompt], [response], np.ones(1, bool))
        assert found[p, s] == pytest.approx(scores_of(model, one, readout)[0], abs=2e-5)


def test_adapters_leave_the_trunk_alone_until_they_are_folded_in(base, monkeypatch, tmp_path):
    at_the_end, merge = {}, LoraModel.merge_and_unload

    def spy(self, *args, **options):
        at_the_end.update(tiny.weights(self.model))
        return merge(self, *args, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", spy)
    before = tiny.weights(loading.load_scorer(base, init_seed=0))
    model, _ = train(loading.load_scorer(base, init_seed=0), lora_rank=4, epochs=1)
    trunk = {name.replace(".base_layer", ""): w for name, w in at_the_end.items() if "lora" not in name}
    trunk = {name: w for name, w in trunk.items() if not name.startswith("score")}
    assert tiny.equal(trunk, {name: w for name, w in before.items() if not name.startswith("score")})
    assert all(w.abs().max() > 0 for name, w in at_the_end.items() if "lora_B" in name)
    after = tiny.weights(model)
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith("_proj.weight") or name == "score.weight"}
    # the trained head, kept by `modules_to_save`, is the one that is saved
    rungs.save_model(model, tmp_path)
    data = sequences(20)
    expected = scores_of(model, data)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(scores_of(loading.load_scorer(tmp_path), data), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_is_decided_by_its_seed(base, lora_rank):
    data = [planted(40, 0)]
    runs = [
        tiny.weights(train(loading.load_scorer(base, init_seed=0), lora_rank, data, epochs=1, seed=(seed,))[0])
        for seed in (0, 0, 1)
    ]
    assert tiny.equal(runs[0], runs[1]) and not tiny.equal(runs[0], runs[2])


OPTIONS = {
    "epochs": 2,
    "prompts_per_batch": 8,
    "lr": 3e-3,
    "muon_lr": 3e-3,
    "readout": "sum",
    "loss": "pointwise",
    "margin": 0.5,
    "centring": 0.5,
}


@pytest.mark.parametrize("name", [*OPTIONS, "lora_rank", "pointwise_weight"])
def test_every_option_changes_what_is_learned(base, name):
    data = [planted(32, 0)]
    common = {"epochs": 1, "loss": "both" if name == "pointwise_weight" else "pairs"}
    value = OPTIONS | {"lora_rank": 2, "pointwise_weight": 0.3}
    runs = []
    for options in (common, common | {name: value[name]}):
        rank = options.pop("lora_rank", 0)
        runs.append(scores_of(train(new_scorer(base), rank, data, **options)[0], sequences(8)))
    assert np.abs(runs[0] - runs[1]).max() > 1e-4


def test_the_micro_batches_do_not_change_what_is_learned(base):
    data = [planted(32, 0)]
    runs = [
        scores_of(train(new_scorer(base), 2, data, epochs=1, lr=1e-3, tokens_per_micro_batch=tokens)[0], sequences(8))
        for tokens in (10**6, 100)
    ]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_a_frozen_reward_model(base):
    """All weights, or the adapters it already has, can be trained further: freezing is undone."""
    data = [planted(32, 0)]
    full = OutcomeRewardModel(new_scorer(base)).model
    before = tiny.weights(full)
    after = tiny.weights(train(full, 0, data, epochs=1)[0])
    assert {name for name in before if torch.equal(before[name], after[name])} == set()
    adapted = OutcomeRewardModel(train(new_scorer(base), 2, data, epochs=1, merge=False)[0]).model
    before = tiny.weights(adapted)
    again = train(adapted, 2, data, epochs=1, merge=False)[0]
    assert again is adapted
    moved = {name for name, weight in tiny.weights(again).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora" in name or "modules_to_save" in name}
    with pytest.raises(ValueError, match="lora_rank: 3, but the model has adapters of rank 2"):
        train(adapted, 3, data)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_bfloat16_model_is_trained_scored_and_saved(base, tmp_path, lora_rank):
    model = loading.load_base(base, "bf16", head="score", local_files_only=True)
    torch.nn.init.zeros_(model.score.weight)
    data = sequences(20)
    assert outcome.sequence_scores(model, data, "sum").dtype == torch.float32
    trained, records = train(model, lora_rank, [planted(120, 0)], merge=False)
    assert records[-1]["accuracy"] > 0.7
    reward = OutcomeRewardModel(trained)
    scores = reward.score(data)
    assert scores.dtype == np.float32 and scores.std() > 0.05
    trunk, head = scorer.trunk_and_head(trained)
    assert next(trunk.parameters()).dtype == torch.bfloat16 and next(head.parameters()).dtype == torch.float32
    reward.save(tmp_path)
    again = loading.load_base(base if lora_rank else tmp_path, "bf16", head="score", local_files_only=True)
    loaded = OutcomeRewardModel.load(tmp_path, again)
    if lora_rank:  # the head lies in float32 beside the adapters; loaded with all weights in bfloat16 it is rounded
        assert tiny.equal(used_weights(loaded.model), used_weights(trained))
    np.testing.assert_allclose(loaded.score(data), scores, rtol=0.02, atol=0.02)


def repeated(num_prompts, seed):
    """Responses of which every prompt's third is its first again."""
    data = planted(num_prompts, seed)
    for array in (data.response_ids, data.response_lengths, data.gold, data.exact):
        array[:, 2] = array[:, 0]
    return data


@READOUTS
def test_equal_responses_have_equal_scores(base, readout):
    data = repeated(20, 3)
    scores = labels.scores_of(OutcomeRewardModel(new_scorer(base), None, readout), data)
    np.testing.assert_array_equal(scores[:, 2], scores[:, 0])
    plain = outcome.sequence_scores(new_scorer(base), labels.sequences_of(data), readout)
    np.testing.assert_allclose(scores.reshape(-1), plain.detach(), atol=2e-5)


def test_equal_tokens_split_otherwise_are_not_the_same_sequence(base):
    """Where the prompt ends decides which tokens are summed."""
    data = sequences(1)
    twice = Sequences(
        np.repeat(data.ids, 2, 0), data.prompt_lengths + np.array([0, 1]), np.repeat(data.lengths, 2), np.ones(2, bool)
    )
    found = scores_of(new_scorer(base), twice, "sum")
    assert abs(found[0] - found[1]) > 1e-3


def test_training_on_equal_responses_counts_each_of_them(base):
    """Its first step's gradient against one without sharing their computation."""
    data, model, seen = repeated(8, 3), new_scorer(base), []
    scores = outcome.sequence_scores(model, labels.sequences_of(data), "last").view(8, 4)
    loss = losses.bradley_terry(scores, torch.from_numpy(data.gold))
    (expected,) = torch.autograd.grad(loss, model.score.weight)
    model.score.weight.register_hook(seen.append)
    train(model, 0, [data], epochs=1, prompts_per_batch=8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-5)


def test_a_batch_holds_each_informative_prompt_once_per_epoch():
    data = [planted(37, 0), planted(20, 1)]
    data[0].gold[:5] = 0.5  # nothing to compare
    seen = []
    for batch in outcome.batches_of([labels.labelled(part) for part in data], 8, "pairs", np.random.default_rng(0)):
        rows, ids = np.arange(len(batch)), batch.sequences.ids
        assert len(batch) % 4 == 0 and len(batch) // 4 <= 8
        np.testing.assert_array_equal(batch.group, np.repeat(np.arange(len(batch) // 4), 4))
        assert (ids[rows, batch.sequences.prompt_lengths - 1] == token_ids()["="]).all()
        assert (ids[rows, batch.sequences.lengths - 1] == EOS_ID).all()
        seen += [tuple(row) for row in batch.gold.reshape(-1, 4)]
    informative = [tuple(row) for responses in data for row in responses.gold if row.max() > row.min()]
    assert sorted(seen) == sorted(informative) and len(seen) < 53


def ragged():
    """Groups 3, 9 and 5 of three, two and one responses; group 9 has equal gold, one response has no gold."""
    gold = np.array([1, np.nan, 0, 0.5, 0.5, 1], np.float32)
    correct = np.array([np.nan, np.nan, 0, 1, np.nan, np.nan], np.float32)
    return Labelled(sequences(6), np.array([3, 3, 3, 9, 9, 5]), gold, correct)


@pytest.mark.parametrize(
    ("loss", "expected"), [("pairs", [0, 2]), ("pointwise", [2, 3]), ("both", [0, 2, 3])]
)  # fmt: skip
def test_batches_hold_the_responses_that_the_loss_can_use(loss, expected):
    data = ragged()
    found = []
    for batch in outcome.batches_of([data], 1, loss, np.random.default_rng(0)):
        assert len(np.unique(batch.group)) == 1 and batch.group[0] == 0
        for row, length in zip(batch.sequences.ids, batch.sequences.lengths, strict=True):
            (index,) = (
                i
                for i in range(6)
                if data.sequences.ids[i, : data.sequences.lengths[i]].tolist() == row[:length].tolist()
            )
            found.append(index)
    assert sorted(found) == expected
    np.testing.assert_array_equal(data.compared(), [True, False, True, False, False, False])


def test_groups_are_bucketed_by_their_longest_sequence(monkeypatch):
    seen, data = [], planted(20, 0)
    monkeypatch.setattr(outcome, "bucketed_batches", lambda lengths, *args: seen.append(lengths) or [])
    list(outcome.batches_of([labels.labelled(data)], 4, "both", np.random.default_rng(0)))
    np.testing.assert_array_equal(seen[0], data.sequences()[1].max(1))


def test_a_data_set_with_nothing_to_learn_beside_another_is_left_out(base):
    empty, data = planted(10, 0), planted(8, 1)
    empty.gold[:] = 0.5
    nothing = labels.labelled(data)[np.array([], int)]
    assert not len(nothing.compared())
    runs = [train(new_scorer(base), 0, parts, epochs=1)[1] for parts in ([data], [empty, data, nothing])]
    assert len(runs[0]) == len(runs[1]) == 1


def test_labelled_texts():
    pairs = [("lists sort : b a =", "a b", "b a"), ("lists reverse : a b c =", "c b a", "c")]
    data = Labelled.from_pairs(pairs, TOKENIZER, strengths=[2.0, 0.5])
    assert data.sequences.responses == ["a b", "b a", "c b a", "c"]
    assert data.sequences.prompts == [pairs[0][0]] * 2 + [pairs[1][0]] * 2
    assert data.group.tolist() == [0, 0, 1, 1] and data.gold.tolist() == [2.0, 0.0, 0.5, 0.0]
    assert np.isnan(data.correct).all() and data.sequences.finished.all()
    assert Labelled.from_pairs(pairs, TOKENIZER).gold.tolist() == [1, 0, 1, 0]
    graded = Labelled.from_labels([("lists sort : b a =", "a b", 1), ("lists sort : b a =", "b", 0)], TOKENIZER)
    assert np.isnan(graded.gold).all() and graded.correct.tolist() == [1, 0] and not graded.compared().any()
    both = Labelled.concat([data, graded])
    assert both.group.tolist() == [0, 0, 1, 1, 2, 3] and both.sequences.responses[-2:] == ["a b", "b"]
    np.testing.assert_array_equal(both.correct, [np.nan] * 4 + [1, 0])
    kept = both[np.array([5, 0])]
    assert kept.sequences.responses == ["b", "a b"] and kept.group.tolist() == [3, 0]


def test_labels_of_responses():
    responses = planted(5, 0)
    data = labels.labelled(responses, TOKENIZER)
    assert len(data) == 20 and data.group.tolist() == np.repeat(np.arange(5), 4).tolist()
    np.testing.assert_array_equal(data.gold.reshape(5, 4), responses.gold)
    np.testing.assert_array_equal(data.correct.reshape(5, 4), responses.exact)
    assert data.sequences.tokenizer is TOKENIZER


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("correct", 0.5, "correct: sample 4 has 0.5; it must be 0 or 1"),
        ("correct", np.inf, "correct: sample 4 has inf"),
        ("gold", -np.inf, "gold: sample 4 has -inf; it must be finite"),
    ],
)
def test_bad_labels_are_named(field, value, message):
    data = ragged()
    array = getattr(data, field).copy()
    array[4] = value
    with pytest.raises(ValueError, match=message):
        Labelled(**(vars(data) | {field: array}))
    with pytest.raises(ValueError, match=f"{field} has shape"):
        Labelled(**(vars(data) | {field: array[:3]}))


def test_bad_texts_are_named():
    pairs = [("lists =", "a", "b"), ("lists =", "a", "b")]
    with pytest.raises(ValueError, match="strengths: sample 1 has 0"):
        Labelled.from_pairs(pairs, TOKENIZER, strengths=[1.0, 0.0])
    with pytest.raises(ValueError, match="2 pairs with 1 strengths"):
        Labelled.from_pairs(pairs, TOKENIZER, strengths=[1.0])
    with pytest.raises(ValueError, match="0 pairs"):
        Labelled.from_pairs([], TOKENIZER)
    with pytest.raises(ValueError, match="no labelled response"):
        Labelled.from_labels([], TOKENIZER)
    with pytest.raises(ValueError, match="correct: sample 1 has 2"):
        Labelled.from_labels([("lists =", "a", 1), ("lists =", "b", 2)], TOKENIZER)


def test_divergence_names_the_step(base):
    model = loading.load_scorer(base, init_seed=0)
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(lm.Diverged, match="step 0: reward-model loss is nan"):
        train(model, 0, [planted(10, 0)])


def test_data_without_a_comparison_is_refused(base):
    data = planted(10, 0)
    data.gold[:] = 0.5
    with pytest.raises(ValueError, match="no prompt .* unequal gold"):
        train(loading.load_scorer(base, init_seed=0), 0, [data])
    train(loading.load_scorer(base, init_seed=0), 0, [data], loss="pointwise", epochs=1)
    unlabelled = Labelled.from_pairs([("lists =", "a", "b")], TOKENIZER)
    with pytest.raises(ValueError, match="no prompt has a correctness label"):
        train(loading.load_scorer(base, init_seed=0), 0, [unlabelled], loss="pointwise")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss: 'hinge' is not one of 'pairs', 'pointwise', 'both'"),
        ({"readout": "first"}, "readout: 'first' is not one of 'last', 'sum'"),
        ({"loss": "pointwise", "margin": 1.0}, "without use in loss='pointwise'"),
        ({"loss": "pointwise", "centring": 1.0}, "without use in loss='pointwise'"),
        ({"pointwise_weight": 2.0}, "without use in loss='pairs'"),
        ({"loss": "both", "pointwise_weight": 0.0}, "pointwise_weight above 0"),
        ({"margin": -1.0}, "at least 0"),
        ({"muon_lr": None}, "muon_lr: needed"),
        ({"epochs": 0}, "epochs: 0 is below 1"),
        ({"prompts_per_batch": 0}, "prompts_per_batch: 0 is below 1"),
    ],
)
def test_bad_training_options_are_refused_before_any_computation(base, monkeypatch, options, message):
    model = loading.load_scorer(base, init_seed=0)
    monkeypatch.setattr(model.model, "forward", lambda *args, **options: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        train(model, 0, [planted(4, 0)], **options)


@pytest.fixture
def nf4(base):
    pytest.importorskip("bitsandbytes")
    return lambda: loading.load_base(base, "nf4", head="score", local_files_only=True)


def test_gradients_of_a_4_bit_model_are_those_of_its_dequantised_weights(base, nf4):
    """Also after it has scored, which would make bitsandbytes repack the weights for a kernel without gradient."""
    from bitsandbytes.functional import dequantize_4bit

    data, model = labels.labelled(planted(8, 0)), random_head(nf4())
    layers = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as on such a processor, where nobody has turned it off
    OutcomeRewardModel(model).score(data.sequences)
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    reference = loading.load_base(base, "bf16", head="score", local_files_only=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state = getattr(parameter, "quant_state", None)
            value = parameter if state is None else dequantize_4bit(parameter.data, state)
            reference.get_parameter(name).copy_(value)
    found = []
    for start in (model, reference):
        adapted = scorer.prepare(start, 4, False, np.random.default_rng(0))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        scores = outcome.sequence_scores(adapted, data.sequences, "last").view(8, 4)
        loss = losses.bradley_terry(scores, torch.from_numpy(data.gold).view(8, 4))
        found.append(torch.autograd.grad(loss, [p for p in adapted.parameters() if p.requires_grad]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99


def test_a_4_bit_model_is_trained_and_saved_by_its_adapters(nf4, tmp_path):
    model, records = train(nf4(), 4, [planted(100, 0)], merge=False)
    assert records[-1]["accuracy"] > 0.75
    reward, data = OutcomeRewardModel(model, TOKENIZER), sequences(20)
    reward.save(tmp_path)
    np.testing.assert_array_equal(OutcomeRewardModel.load(tmp_path, nf4()).score(data), reward.score(data))
    with pytest.raises(ValueError, match="rounded away; give merge=False"):
        reward.save(tmp_path, merge=True)
    with pytest.raises(ValueError, match="rounded away; give merge=False"):
        train(nf4(), 4, [planted(4, 0)])
    with pytest.raises(ValueError, match="cannot be trained without adapters"):
        train(nf4(), 0, [planted(4, 0)], merge=False)
