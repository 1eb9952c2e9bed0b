"""Every stage on a graph of the smallest size, through a real store: artifacts load, agree with one another, repeat."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhfscale.bed import demonstrations as data
from rlhfscale.bed import labels, ladder, specs, stages, tasks
from rlhfscale.bed.demonstrations import demonstration_nats, encode, tokens
from rlhfscale.bed.responses import Responses, decode, label
from rlhfscale.models import lm, loading
from rlhfscale.models.documents import pad
from rlhfscale.rewards import outcome
from rlhfscale.rl import networks
from rlhfscale.runs.store import Store
from rlhfscale.runs.worker import make
from rlhfscale.samplers.base import Completions

FAMILIES = tuple(tasks.FAMILIES)
RATES = {"batch_size": 32, "lr": 3e-3, "muon_lr": 5e-3}
PRETRAIN = specs.Pretrain(rung="25k", num_documents=2000, slip=0.1, seed=1, **RATES)
SFT = specs.SFT(base=PRETRAIN, families=FAMILIES, num_documents=300, slip=0.1, seed=1, **RATES)


def sampled(model=SFT, split="train", seed=0, num_samples=4, **options):
    settings = {"num_prompts": 24, "temperature": 1.0, "prompt_seed": seed} | options
    return specs.Samples(
        model=model, split=split, families=FAMILIES, num_samples=num_samples, seed=seed, **settings
    )  # fmt: skip


REWARD_MODEL = specs.RewardModel(
    base=SFT, data=(sampled(), sampled(seed=1)), held_out=(sampled(split="eval"),), num_prompts=48, epochs=1,
    prompts_per_batch=8, lr=1e-2, muon_lr=5e-3, lora_rank=0, loss="both", readout="sum", seed=0,
)  # fmt: skip
POLICY = specs.Policy(
    sft=SFT, reward_model=REWARD_MODEL, algorithm="ppo", critic="separate", num_updates=2, prompts_per_update=8,
    responses_per_prompt=2, epochs=1, minibatch_size=8, policy_lr=5e-3, critic_lr=5e-3, value_coefficient=0.1,
    kl_coefficient=0.05, clip=0.2, value_clip=0.2, gamma=1.0, lam=0.95, temperature=1.0, max_grad_norm=1.0,
    missing_eos_penalty=1.0, lora_rank=2, lora_alpha=4.0, seed=0,
)  # fmt: skip
FIELDS = {name: getattr(POLICY, name) for name in specs.Policy.model_fields}
NO_CRITIC = dict.fromkeys(specs.Policy.ppo_only)
SIBLINGS = tuple(specs.Policy(**FIELDS | NO_CRITIC | {"algorithm": name}) for name in ("grpo", "rloo"))
OF_POLICY = sampled(POLICY, "eval", seed=3)
GREEDY = sampled(POLICY, "eval", seed=3, num_samples=1, temperature=0.0)
SCORES = specs.Scores(samples=OF_POLICY, reward_model=REWARD_MODEL)
GRAPH = list(dict.fromkeys(spec for top in (SCORES, GREEDY, *SIBLINGS) for spec in top.walk()))


def made(folder):
    store = Store(folder)
    for spec in GRAPH:
        assert make(spec, store) in ("done", "cached")
    return {spec: store.open(spec.key) for spec in GRAPH}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return made(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    return made(tmp_path_factory.mktemp("second"))


def responses_of(folders, spec) -> Responses:
    return Responses.load(folders[spec] / "responses.safetensors")


def test_the_same_specs_give_the_same_bytes(folders, again):
    compared = 0
    for spec in GRAPH:
        for file in sorted(folders[spec].rglob("*")):
            if file.suffix in (".safetensors", ".csv") or file.name == "reward.json":
                assert file.read_bytes() == (again[spec] / file.relative_to(folders[spec])).read_bytes(), file
                compared += 1
    assert compared > 15


def test_models_are_plain_transformers_folders(folders):
    ids = torch.tensor(data.encode_prompts(data.problem_list((0, 9), "eval", FAMILIES, 1)))
    for spec in (PRETRAIN, SFT, POLICY):
        model = AutoModelForCausalLM.from_pretrained(folders[spec] / "model")
        assert sum(p.numel() for p in model.parameters()) == ladder.rung("25k").num_params_with_embeddings
        assert torch.isfinite(model(input_ids=ids).logits).all()
        tokenizer = AutoTokenizer.from_pretrained(folders[spec] / "model")
        assert tokenizer("lists reverse : b a =").input_ids == [1, *encode("lists reverse : b a =")]
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    scorer = AutoModelForSequenceClassification.from_pretrained(folders[REWARD_MODEL] / "model")
    assert scorer(input_ids=ids).logits.shape == (1, 1)


def test_pretraining_reports_its_loss(folders):
    points = pd.read_csv(folders[PRETRAIN] / "loss.csv")
    train = pd.read_csv(folders[PRETRAIN] / "train.csv")
    assert len(points) == stages.LOSS_POINTS and points.step.iloc[-1] == len(train) == -(-2000 // 32)
    assert points.loss_nats.iloc[-1] < points.loss_nats.iloc[0] - 0.2
    assert (np.diff(points.tokens) > 0).all()
    length = points.tokens.iloc[-1] / PRETRAIN.num_documents
    np.testing.assert_allclose(points.flops, [ladder.rung("25k").train_flops(t, length) for t in points.tokens])
    model = loading.load_policy(folders[PRETRAIN] / "model")
    held_out, documents = (
        load_file(folders[PRETRAIN] / "held_out.safetensors"),
        data.held_out_documents(PRETRAIN.slip),
    )
    np.testing.assert_allclose(held_out["nats"], lm.document_losses(model, documents), rtol=1e-4)
    np.testing.assert_allclose(held_out["demonstrators_nats"], demonstration_nats(documents, PRETRAIN.slip))
    assert held_out["tokens"].sum() == (documents.lengths - documents.prompt_lengths).sum()
    assert points.loss_nats.iloc[-1] == pytest.approx(held_out["nats"].sum() / held_out["tokens"].sum(), rel=1e-6)
    assert points.loss_nats.iloc[-1] > held_out["demonstrators_nats"].sum() / held_out["tokens"].sum()


def test_sft_and_policy_change_their_parent(folders):
    weights = [load_file(folders[spec] / "model" / "model.safetensors") for spec in (PRETRAIN, SFT, POLICY)]
    for parent, child in itertools.pairwise(weights):
        assert parent.keys() == child.keys()
        assert any(not np.array_equal(parent[name], child[name]) for name in parent)


def test_responses_are_graded_as_their_text_says(folders):
    for spec in (sampled(), OF_POLICY, GREEDY):
        found = responses_of(folders, spec)
        stream = (spec.prompt_seed, stages.STREAM[spec.split])
        problems = data.problem_list(stream, spec.split, FAMILIES, spec.num_prompts)
        prompts = data.encode_prompts(problems)
        assert (found.num_prompts, found.num_samples) == (spec.num_prompts, spec.num_samples)
        for p, problem in enumerate(problems):
            assert found.prompt_ids[p, : found.prompt_lengths[p]].tolist() == prompts[p]
            assert FAMILIES[found.family[p]] == problem.family and found.difficulty[p] == problem.difficulty
            for s in range(found.num_samples):
                ids = found.response_ids[p, s, : found.response_lengths[p, s]].tolist()
                assert (ids[-1] == ladder.EOS_ID) == found.finished[p, s]
                text = " ".join(tokens()[i] for i in ids if i > ladder.EOS_ID)
                grade = tasks.grade(problem, text, bool(found.finished[p, s]))
                assert found.gold[p, s] == pytest.approx(grade.gold) and found.exact[p, s] == grade.exact
                assert (found.steps_right[p, s], found.steps_written[p, s]) == (sum(grade.steps), len(grade.steps))


def test_the_same_prompts_are_sampled_anew_by_another_seed(folders):
    first, second = (responses_of(folders, spec) for spec in REWARD_MODEL.data)
    assert not np.array_equal(first.prompt_ids, second.prompt_ids)  # another prompt_seed
    assert not np.array_equal(responses_of(folders, sampled(split="eval")).prompt_ids, first.prompt_ids)


def test_scores_are_those_of_the_reward_model(folders):
    """Read out by hand over the response, from the plain model of one sequence at a time."""
    found = load_file(folders[SCORES] / "scores.safetensors")["scores"]
    model = AutoModelForSequenceClassification.from_pretrained(folders[REWARD_MODEL] / "model").eval()
    responses = responses_of(folders, OF_POLICY)
    assert found.shape == responses.gold.shape and found.std() > 1e-3
    for p, s in [(0, 0), (3, 1), (23, 3)]:
        prompt = responses.prompt_ids[p, : responses.prompt_lengths[p]].tolist()
        response = responses.response_ids[p, s, : responses.response_lengths[p, s]].tolist()
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
            expected = model.score(hidden)[len(prompt) :].sum().item()
        assert found[p, s] == pytest.approx(expected, abs=2e-5)


def test_the_reward_model_reports_scale_and_held_out_accuracy(folders):
    reward = outcome.OutcomeRewardModel.load(folders[REWARD_MODEL] / "model")
    training = [responses_of(folders, spec).head(24) for spec in REWARD_MODEL.data]
    scores = np.concatenate([labels.scores_of(reward, responses).ravel() for responses in training])
    assert reward.readout == REWARD_MODEL.readout
    assert (reward.mean, reward.std) == (pytest.approx(scores.mean(), abs=1e-4), pytest.approx(scores.std(), rel=1e-3))
    held_out = responses_of(folders, REWARD_MODEL.held_out[0])
    found = load_file(folders[REWARD_MODEL] / "held_out.safetensors")
    expected = outcome.pair_accuracy(labels.scores_of(reward, held_out), held_out.gold)
    np.testing.assert_allclose(found["pair_accuracy"][0], expected, atol=1e-6)
    assert found["num_pairs"] == sum(outcome.num_pairs(responses.gold) for responses in training)


def test_the_policy_folder_holds_what_plain_peft_needs(folders):
    """Base and adapter together are the saved policy; the critic's adapter and value head lie beside it."""
    base = AutoModelForCausalLM.from_pretrained(folders[SFT] / "model")
    adapters = folders[POLICY] / "adapters"
    ids = torch.tensor(data.encode_prompts(data.problem_list((0, 9), "eval", FAMILIES, 1)))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(folders[POLICY] / "model")(ids).logits
        assert (base(ids).logits - merged).abs().max() > 1e-3
        loaded = PeftModel.from_pretrained(base, adapters / "policy").eval()
        torch.testing.assert_close(loaded(ids).logits, merged, rtol=0, atol=1e-5)
        loaded.load_adapter(adapters / "critic", adapter_name="critic")
    head = networks.ValueHead(base.config.hidden_size)
    head.load_state_dict(load_tensors(adapters / "value_head.safetensors"))
    assert head.linear.weight.abs().max() > 0
    table = pd.read_csv(folders[POLICY] / "metrics.csv")
    assert table["update"].tolist() == [0, 1]
    assert {"proxy", "gold", "exact", "kl_nats", "clip_fraction", "explained_variance"} <= set(table.columns)
    assert {"entropy_nats", "response_tokens", "finished"} <= set(table.columns)
    assert np.isfinite(table.to_numpy()).all() and abs(table.kl_nats[0]) < 1e-4


@pytest.mark.parametrize("spec", SIBLINGS, ids=lambda spec: spec.algorithm)
def test_the_siblings_of_ppo_train_without_a_critic(folders, spec):
    table = pd.read_csv(folders[spec] / "metrics.csv")
    assert np.isfinite(table.to_numpy()).all() and table.steps.tolist() == [2, 2] and abs(table.kl_nats[0]) < 1e-4
    assert {"proxy", "gold", "exact", "kl_nats"} <= set(table.columns) and "value_loss" not in table
    assert sorted(path.name for path in (folders[spec] / "adapters").iterdir() if path.is_dir()) == ["policy"]
    weights = {s: load_file(folders[s] / "model" / "model.safetensors") for s in (SFT, POLICY, *SIBLINGS)}
    for other in weights.keys() - {spec}:
        assert any(not np.array_equal(weights[spec][name], value) for name, value in weights[other].items())
    ppo = pd.read_csv(folders[POLICY] / "metrics.csv")
    assert table.proxy[0] == pytest.approx(ppo.proxy[0])  # equal seeds draw equal first roll-outs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"critic_lr": None, "lam": None}, "ppo needs critic_lr, lam"),
        ({"algorithm": "grpo"}, "grpo has no critic and no use for critic, critic_lr"),
        (
            NO_CRITIC | {"algorithm": "rloo", "gamma": 1.0},
            "rloo has no critic and no use for gamma",
        ),
        (
            NO_CRITIC | {"algorithm": "grpo", "responses_per_prompt": 1},
            "responses_per_prompt: grpo",
        ),
        ({"algorithm": "dpo"}, "ppo"),
    ],
)
def test_a_policy_has_the_fields_of_its_algorithm(change, words):
    with pytest.raises(ValueError, match=words):
        specs.Policy(**FIELDS | change)


def test_no_artifact_names_the_folder_it_was_made_from(folders):
    """An artifact copied to another machine, or compared with one made there, holds no path of this one."""
    for spec, folder in folders.items():
        for file in folder.rglob("*"):
            if file.suffix in (".json", ".md", ".csv"):
                assert str(folder.parent.parent) not in file.read_text(), (spec.stage, file.name)
    config = json.loads((folders[POLICY] / "adapters" / "policy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == SFT.key


# --- Responses, from hand-made completions ---


def hand_made():
    """Two prompts with three responses each, as text; None: cut before the end of sequence."""
    problems = data.problem_list((0, 60), "train", ("lists",), 2)
    right = [" ; ".join(" ".join(state) for state in problem.states) for problem in problems]
    answers = [problem.states[-1] for problem in problems]
    texts = [
        [(right[0], True), ("a ; " + " ".join(answers[0]), True), (right[0], False)],
        [("", True), (right[1], True), ("b ; c ; b", True)],
    ]
    flat = [item for row in texts for item in row]
    ids = [encode(text) + [ladder.EOS_ID] * finished for text, finished in flat]
    completions = Completions(
        ids=pad(ids).astype(np.int32),
        lengths=np.array([len(row) for row in ids]),
        finished=np.array([finished for _, finished in flat]),
        logprobs=np.zeros((6, max(map(len, ids))), np.float32),
        temperature=1.0,
        seeds=np.arange(6, dtype=np.uint64),
    )
    return problems, texts, label(problems, completions)


def test_responses_survive_saving(tmp_path):
    _, _, responses = hand_made()
    responses.save(tmp_path / "r.safetensors")
    loaded = Responses.load(tmp_path / "r.safetensors")
    for name, array in vars(responses).items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
        assert getattr(loaded, name).dtype == array.dtype
    head = loaded.head(1)
    assert head.num_prompts == 1 and head.num_samples == 3
    np.testing.assert_array_equal(head.response_ids, responses.response_ids[:1])


def test_sequences_join_prompt_and_response():
    problems, texts, responses = hand_made()
    ids, lengths = responses.sequences()
    assert ids.dtype == lengths.dtype == np.int64 and ids.shape == (2, 3, lengths.max())
    for p, problem in enumerate(problems):
        for s, (text, finished) in enumerate(texts[p]):
            expected = [ladder.BOS_ID, *encode(problem.prompt), *encode(text), *[ladder.EOS_ID] * finished]
            assert ids[p, s, : lengths[p, s]].tolist() == expected
            assert (ids[p, s, lengths[p, s] :] == ladder.PAD_ID).all()
            assert decode(ids[p, s, 1 : lengths[p, s]]) == f"{problem.prompt} {text}".strip()


def test_answers_are_equal_where_the_last_state_is():
    _, _, responses = hand_made()
    answers = responses.answers()
    assert answers[0, 0] == answers[0, 1] != -1 and answers[0, 2] == -1
    assert len(set(answers[1])) == 3 and -1 not in answers[1]  # the empty answer counts as one


def test_answers_agree_with_the_text(folders):
    responses = responses_of(folders, OF_POLICY)
    answers = responses.answers()
    for p in range(responses.num_prompts):
        texts = [
            decode(responses.response_ids[p, s, : responses.response_lengths[p, s]]).split(";")[-1].split()
            for s in range(responses.num_samples)
        ]
        for a in range(len(texts)):
            assert (answers[p, a] == -1) == (not responses.finished[p, a])
            for b in range(len(texts)):
                if responses.finished[p, a] and responses.finished[p, b]:
                    assert (answers[p, a] == answers[p, b]) == (texts[a] == texts[b])


def test_the_saved_adapter_has_the_size_asked_for(folders):
    config = json.loads((folders[POLICY] / "adapters" / "policy" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4.0, 0.0)


def test_special_tokens_inside_an_answer_make_it_wrong():
    """A policy must not be paid for a right answer with padding or a second beginning in it."""
    problem = next(tasks.problems((0, 1), "train"))
    right = encode(" ; ".join(" ".join(state) for state in problem.states))
    for inside in (ladder.PAD_ID, ladder.BOS_ID):
        spoiled = [*right[:-1], inside, right[-1], ladder.EOS_ID]
        assert not tasks.grade(problem, decode(spoiled)).exact
    assert tasks.grade(problem, decode([*right, ladder.EOS_ID])).exact
