"""Best-of-N on one's own prompts, ``rlhfscale sample`` and ``rlhfscale merge``."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tiny
import tiny_rl
from rlhfscale.bed import ladder, rungs
from rlhfscale.cli import app
from rlhfscale.evals import sampling
from rlhfscale.models import loading
from rlhfscale.rewards import OutcomeRewardModel
from rlhfscale.rl import PPO

PROMPTS = [f"lists sort : {letter} b a =" for letter in "abcdefghijkl"] * 2
TOKENIZER = rungs.build_tokenizer()


def length(prompts, responses):
    return [float(len(response.split())) for response in responses]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reward model of the same kind."""
    root = tmp_path_factory.mktemp("models")
    rungs.save_model(tiny.model(), root / "policy")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = OutcomeRewardModel(loading.load_scorer(root / "policy", init_seed=0), TOKENIZER, "sum")
    reward.save(root / "reward")
    return root


def test_the_best_of_n_has_the_highest_score():
    found = sampling.best_of(tiny.model(), TOKENIZER, length, PROMPTS[:6], 5, max_new_tokens=6, seed=3)
    for answers in found:
        assert answers.scores == tuple(length([], answers.responses)) and len(answers.responses) == 5
        assert answers.scores[answers.best] == max(answers.scores)
    assert len({answers.best for answers in found}) > 1


def test_a_response_does_not_depend_on_the_prompts_beside_it():
    options = {"max_new_tokens": 6, "seed": 3}
    whole = sampling.best_of(tiny.model(), TOKENIZER, None, PROMPTS[:6], 3, **options)
    part = sampling.best_of(tiny.model(), TOKENIZER, None, PROMPTS[4:6], 3, first=4, **options)
    assert whole[4:] == part and whole[0] != whole[1]


def test_conversations_go_through_the_template():
    import tiny_chat

    model, tokenizer = tiny_chat.model_and_tokenizer()
    prompt = [{"role": "user", "content": "hello"}]
    (found,) = sampling.best_of(model, tokenizer, length, [prompt], 2, max_new_tokens=4)
    assert len(found.responses) == 2


def call(*arguments):
    found = CliRunner().invoke(app, ["sample", *map(str, arguments)])
    return found.exit_code, found.output


def written(tmp_path, folders, *more, rows=PROMPTS, name="out.jsonl", n=3):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(rows)))
    arguments = ["--policy", folders / "policy", "--prompts", file, "--out", tmp_path / name, "--n", n]
    return [*arguments, "--max-new-tokens", 6, "--dtype", "fp32", *more]


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rows_hold_prompt_response_and_score(tmp_path, folders):
    code, output = call(*written(tmp_path, folders, "--reward", folders / "reward"))
    assert code == 0 and "72 rows" in output
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows[::3]] == PROMPTS and [row["id"] for row in rows[::3]] == list(range(24))
    reward = OutcomeRewardModel.load(folders / "reward")
    again = sampling.best_of(loading.load_policy(folders / "policy"), TOKENIZER, reward, PROMPTS, 3, max_new_tokens=6)
    for index, answers in enumerate(again):
        part = rows[3 * index : 3 * index + 3]
        assert [row["response"] for row in part] == list(answers.responses)
        np.testing.assert_allclose([row["score"] for row in part], answers.scores, rtol=1e-5)
        assert [row["best"] for row in part].index(True) == answers.best
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_best_of_keeps_one_row_each_also_as_parquet(tmp_path, folders):
    arguments = written(tmp_path, folders, "--reward", folders / "reward", "--best-of", name="best.parquet")
    assert call(*arguments)[0] == 0
    table = pd.read_parquet(tmp_path / "best.parquet")
    assert table["prompt"].tolist() == PROMPTS and table["best"].all()


def test_line_separators_of_unicode_are_text(tmp_path, folders, monkeypatch):
    """JSON leaves U+2028 and U+0085 as they are, and they end no line of the file."""
    odd = "x\u2028y\x85z"
    monkeypatch.setattr(
        sampling, "best_of", lambda *given, n, **_: [sampling.Answers((odd,) * n, (True,) * n) for _ in given[3]]
    )
    arguments = written(tmp_path, folders)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "lists sort : a =", "note": odd}, ensure_ascii=False) + "\n")
    assert call(*arguments)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["response"] for row in rows] == [odd] * 3 and rows[0]["note"] == odd


def test_a_trainers_run_is_a_policy(tmp_path, folders):
    base = AutoModelForCausalLM.from_pretrained(folders / "policy")
    run = tiny_rl.trainer(PPO, base=base)
    run.train(PROMPTS, 1, folder=tmp_path / "run", progress=False)
    assert call(*written(tmp_path, folders), "--policy", tmp_path / "run")[0] == 0


def test_texts_and_messages_fit_into_no_parquet_column(tmp_path, folders):
    arguments = written(tmp_path, folders, name="out.parquet")
    rows = [{"prompt": "lists sort : a ="}, {"messages": [{"role": "user", "content": "a"}]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output = call(*arguments)
    assert code == 2 and "--out: a Parquet column cannot hold texts and messages" in output


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_run_goes_on_to_the_same_rows(tmp_path, folders, monkeypatch, cut):
    assert call(*written(tmp_path, folders))[0] == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    calls, answer = [], sampling.best_of

    def stops(*given, **options):
        calls.append(options["first"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(*given, **options)

    monkeypatch.setattr(sampling, "best_of", stops)
    assert call(*written(tmp_path, folders))[0] == 130
    part = tmp_path / "out.jsonl.part"
    if cut:
        part.write_bytes(part.read_bytes() + b'{"prompt": "lists')  # killed in the middle of a line
    assert call(*written(tmp_path, folders, "--seed", 5)) == (
        2, f"error: {part}: an unfinished run with other options; finish it with those, or delete the file\n"
    )  # fmt: skip
    assert call(*written(tmp_path, folders))[0] == 0
    assert calls == [0, 16, 16] and (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: no JSON"),
        ('{"text": "a"}', "line 2: needs a prompt"),
        ('{"prompt": " "}', "line 2: needs a prompt"),
        ('["a"]', "line 2: needs a prompt"),
        ('{"messages": [{"role": "user"}]}', "line 2: needs a prompt"),
        ('{"prompt": "lists sort : a =", "score": 1}', "line 2: score would be overwritten"),
        (json.dumps({"prompt": "lists sort : a = " * 12}), "line 2: 61 tokens and max-new-tokens=6 do not fit"),
    ],
)
def test_a_bad_line_is_named(tmp_path, folders, line, words):
    arguments = written(tmp_path, folders)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "lists sort : a ="}) + "\n" + line + "\n")
    code, output = call(*arguments)
    assert code == 2 and f"{file}, {words}" in output
    file.write_text("\n")
    assert call(*arguments)[1] == f"error: {file}: holds no prompt\n"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--best-of"], "--best-of: needs --reward"),
        (["--out", "rows.txt"], "--out: rows.txt must end in .jsonl or .parquet"),
        (["--reward", "nowhere"], "--reward: nowhere: no such folder"),
        (["--policy", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, folders, more, words):
    code, output = call(*written(tmp_path, folders, *more))
    assert code == 2 and words in output and "Traceback" not in output


def test_a_merged_adapter_is_the_policy(tmp_path, folders):
    base = AutoModelForCausalLM.from_pretrained(folders / "policy")
    run = tiny_rl.trainer(PPO, base=base)
    run.networks.base.config._name_or_path = str(folders / "policy")
    tiny_rl.randomise(run.networks)
    run.networks.save(tmp_path / "adapters")
    (config,) = (tmp_path / "adapters").rglob("policy/adapter_config.json")
    about = json.loads(config.read_text())
    config.write_text(json.dumps(about | {"base_model_name_or_path": str(folders / "policy")}))
    arguments = ["merge", "--policy", str(config.parent), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0 and "revision" in found.output, found.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, run.networks.merged_policy()(ids).logits, rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "merged" / "model.safetensors") and len(TOKENIZER) == ladder.vocab_size()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "exists; choose a new folder" in again.output
