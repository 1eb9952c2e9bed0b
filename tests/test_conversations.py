"""Conversations: a reward model reads them by its own chat template, and functions of texts get the messages."""

import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

import tiny_rl
from rlhfscale.rewards import Mixed, Normalised, OutcomeRewardModel, Pooled, conversations
from rlhfscale.rl import GRPO, PPO
from rlhfscale.samplers.prompts import encode

MARKED = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<e>"
    "{% else %}{{ raise_exception('only users and assistants speak here') }}{% endif %}{% endfor %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz ?.[]"
TALKS = [
    [{"role": "user", "content": "name a river?"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "name two rivers?"},
    ],
    [{"role": "user", "content": "why is the sky blue?"}],
    [{"role": "user", "content": "b"}],
]
SYSTEM = [{"role": "system", "content": "be kind."}, *TALKS[0]]


def characters(template, specials=("<p>", "<s>", "<e>", "<u>", "<a>"), letters=LETTERS):
    """A tokenizer of one token for each character; ``letters`` decides the ids, ``template`` is the chat template."""
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<p>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    built.decoder = decoders.Fuse()
    names = {"pad_token": "<p>", "bos_token": "<s>", "eos_token": "<e>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, extra_special_tokens=["<u>", "<a>"], **names)
    tokenizer.chat_template = template
    return tokenizer


POLICY = characters(MARKED)
SAME_BUT_TEMPLATE = characters(BRACKETS)
OTHER_FAMILY = characters(BRACKETS, letters=LETTERS[::-1])
OTHER_MARKED = characters(MARKED, letters=LETTERS[::-1])
PLAIN = characters(None, letters=LETTERS + "\n")


def classifier(tokenizer, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **shape)
        model = LlamaForSequenceClassification(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    return model


def trainer(reward, algorithm=PPO, **options):
    base = tiny_rl.language_model(vocab_size=len(POLICY))
    from rlhfscale.rl import GRPOConfig, PPOConfig

    config = {PPO: PPOConfig, GRPO: GRPOConfig}[algorithm]
    settings = {"prompts_per_update": 4, "responses_per_prompt": 2, "max_new_tokens": 6, "lora_rank": 2}
    return algorithm(base, POLICY, reward, config(**settings | options))


def sampled(prompts=tuple(TALKS)):
    """What the policy answers, as a reward sees it."""
    seen = []
    run = trainer(lambda prompts, responses: [0.0] * len(prompts))
    run.reward.score = lambda sequences: seen.append(sequences) or np.zeros(len(sequences), np.float32)
    run.update(list(prompts))
    return seen[0]


@pytest.mark.parametrize(
    "own", [OTHER_FAMILY, OTHER_MARKED, SAME_BUT_TEMPLATE], ids=["other family", "other tokens", "other template"]
)
def test_scores_are_those_of_the_rendered_conversation(own):
    """Against transformers' own forward pass over what the reward model's template writes."""
    sequences, model = sampled(), classifier(own)
    found = OutcomeRewardModel(model, own, "last").score(sequences)
    assert 0 < sequences.finished.sum() < len(sequences)
    for row in range(len(sequences)):
        said = [*TALKS[row // 2], {"role": "assistant", "content": sequences.responses[row]}]
        options = {} if sequences.finished[row] else {"continue_final_message": True}
        ids = own.apply_chat_template(said, return_dict=True, **options)["input_ids"]
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            expected = model.score(hidden).item()
        assert found[row] == pytest.approx(expected, abs=1e-5), row


def test_the_sum_is_read_at_the_response_alone():
    sequences, model = sampled(), classifier(OTHER_FAMILY)
    found = OutcomeRewardModel(model, OTHER_FAMILY, "sum").score(sequences)
    for row in range(len(sequences)):
        head, tail = conversations.render(
            OTHER_FAMILY, TALKS[row // 2], sequences.responses[row], bool(sequences.finished[row])
        )
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([[*head, *tail]])).last_hidden_state[0]
            expected = model.score(hidden)[len(head) :].sum().item()
        assert found[row] == pytest.approx(expected, abs=1e-4), row


def prompt_ids(sequences, row):
    return sequences.ids[row, : sequences.prompt_lengths[row]].tolist()


def test_the_same_template_keeps_the_ids(monkeypatch):
    sequences = sampled()
    monkeypatch.setattr(conversations, "render", lambda *_: pytest.fail("rendered again"))
    assert OutcomeRewardModel(classifier(POLICY), characters(MARKED)).own(sequences) is sequences


def test_a_model_without_a_template_gets_plain_text_and_says_so_once():
    sequences, reward = sampled(), OutcomeRewardModel(classifier(PLAIN), PLAIN)
    with pytest.warns(UserWarning, match="no chat template: it reads conversations as plain text"):
        own = reward.own(sequences)
    assert prompt_ids(own, 2) == PLAIN("hi\nhello\nname two rivers?").input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.score(sequences)


def test_texts_beside_conversations_stay_texts():
    sequences = sampled([TALKS[0], "name a river?", TALKS[3], "b"])
    own = OutcomeRewardModel(classifier(OTHER_FAMILY), OTHER_FAMILY).own(sequences)
    assert prompt_ids(own, 2) == OTHER_FAMILY("name a river?").input_ids
    assert prompt_ids(own, 0) == OTHER_FAMILY("<s>[name a river?]").input_ids
    assert own.responses == sequences.responses


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: Normalised(r, 0.0, 1.0), lambda r: Mixed([(1.0, r)])])
def test_a_template_that_refuses_is_named_before_anything_is_sampled(wrap):
    run = trainer(wrap(OutcomeRewardModel(classifier(OTHER_FAMILY), OTHER_FAMILY)))
    run.sampler = lambda *_, **__: pytest.fail("sampled")
    words = "chat template refuses a conversation of system, user: only users and assistants speak here"
    with pytest.raises(ValueError, match=words):
        run.train([*TALKS, SYSTEM], 1, progress=False)
    with pytest.raises(ValueError, match=words):
        run.train(TALKS, 1, eval_prompts=[SYSTEM], progress=False)
    trainer(OutcomeRewardModel(classifier(OTHER_MARKED), OTHER_MARKED)).train([*TALKS, SYSTEM], 1, progress=False)


def test_functions_of_texts_get_the_messages_also_from_a_collection():
    asked = []

    def reward(prompts, responses):
        asked.append(prompts)
        return [float(len(response)) for response in responses]

    trainer(reward).train([*TALKS, "b", "c"], 3, watch={"same": reward}, eval_prompts=TALKS[:1], progress=False)
    kinds = {type(prompt) for prompts in asked for prompt in prompts}
    assert kinds == {list, str}
    known = [*TALKS, "b", "c"]
    assert all(prompt in known for prompts in asked for prompt in prompts)
    single = Pooled(lambda prompt, response: float(prompt in known))
    assert single.score(sampled()).tolist() == [1.0] * 8


def test_dynamic_sampling_keeps_conversations():
    seen = []

    def watched(prompts, responses):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    run = trainer(lambda prompts, responses: [float(len(r) % 2) for r in responses], GRPO, dynamic_sampling=20)
    run.train(TALKS, 2, watch={"watched": watched}, progress=False)
    assert len(seen) == 16 and all(prompt in TALKS for prompt in seen)


def test_indexing_keeps_conversations():
    sequences = sampled([TALKS[0], "b", TALKS[1], "c"])
    assert sequences[np.array([4, 2])].conversations == (TALKS[1], None)
    assert sequences[2:5].conversations == (None, None, TALKS[1])
    assert sampled(["a", "b", "c", "d"]).conversations is None
    (ids,) = encode(POLICY, [TALKS[1]])
    assert encode(POLICY, [ids])[0].messages == TALKS[1]
