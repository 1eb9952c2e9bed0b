"""Data in the formats that people have: the same tokens as by hand, from every kind of source; bad rows are named."""

import json

import numpy as np
import pandas as pd
import pytest

from rlhfscale.rewards import Labelled, formats, outcome, process
from test_conversations import BRACKETS, LETTERS, characters, classifier

TOKENIZER = characters(BRACKETS, letters=LETTERS + "\n")
TEXTS = [
    {"prompt": "name a river?", "chosen": " rhine", "rejected": " paris", "id": 1},
    {"prompt": "b", "chosen": "c", "rejected": "d", "id": 2},
]
ASKED = [{"role": "user", "content": "name a river?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def written(rows, folder, kind):
    if kind == "rows":
        return rows
    if kind == "datasets":
        return pytest.importorskip("datasets").Dataset.from_list(rows)
    file = folder / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pd.DataFrame(rows).to_parquet(file)
    return file


def same(a, b):
    np.testing.assert_array_equal(a.sequences.ids, b.sequences.ids)
    np.testing.assert_array_equal(a.sequences.prompt_lengths, b.sequences.prompt_lengths)
    for name in ("group", "gold", "correct"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


KINDS = ["rows", "datasets", "jsonl", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_texts_are_those_of_from_pairs(kind, tmp_path):
    expected = Labelled.from_pairs([(row["prompt"], row["chosen"], row["rejected"]) for row in TEXTS], TOKENIZER)
    same(formats.preferences(written(TEXTS, tmp_path, kind), TOKENIZER), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_rendered(kind, tmp_path):
    """With the prompt apart, and as whole conversations: the same tokens as the template writes."""
    apart = [{"prompt": ASKED, "chosen": said("rhine"), "rejected": said("paris")}] * 2
    whole = [{"chosen": ASKED + said("rhine"), "rejected": ASKED + said("paris")}] * 2
    found = formats.preferences(written(apart, tmp_path, kind), TOKENIZER)
    same(found, formats.preferences(written(whole, tmp_path, kind), TOKENIZER))
    for row, text in enumerate(["rhine", "paris"] * 2):
        ids = TOKENIZER.apply_chat_template(ASKED + said(text), return_dict=True)["input_ids"]
        assert found.sequences.ids[row, : found.sequences.lengths[row]].tolist() == ids
        start = found.sequences.prompt_lengths[row]
        assert ids[:start] == TOKENIZER.apply_chat_template(ASKED, return_dict=True)["input_ids"]
    assert found.gold.tolist() == [1, 0, 1, 0] and found.group.tolist() == [0, 0, 1, 1]


def test_texts_without_a_prompt_share_their_beginning():
    whole = [{"chosen": "name a river? rhine", "rejected": "name a river? rome"}]
    apart = [{"prompt": "name a river? ", "chosen": "rhine", "rejected": "rome"}]
    same(formats.preferences(whole, TOKENIZER), formats.preferences(apart, TOKENIZER))


def test_a_completion_that_begins_like_its_prompt_is_kept_whole():
    pairs = [("a", "a b", "c")]
    same(formats.preferences([{"prompt": "a", "chosen": "a b", "rejected": "c"}], TOKENIZER),
         Labelled.from_pairs(pairs, TOKENIZER))  # fmt: skip
    lines = [{"chosen": "q\nb", "rejected": "q\nc"}]
    same(formats.preferences(lines, TOKENIZER), Labelled.from_pairs([("q\n", "b", "c")], TOKENIZER))


def test_correctness_of_texts_and_conversations():
    rows = [
        {"prompt": "b", "completion": "c", "label": True},
        {"prompt": ASKED, "completion": said("paris"), "label": 0},
        {"prompt": ASKED, "completion": ASKED + said("rhine"), "label": np.float32(1)},
    ]
    found = formats.correctness(rows, TOKENIZER)
    assert found.correct.tolist() == [1, 0, 1] and np.isnan(found.gold).all()
    expected = Labelled.from_labels([("b", "c", 1.0)], TOKENIZER).sequences
    assert found.sequences.ids[0, : found.sequences.lengths[0]].tolist() == expected.ids[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_trained_on(kind, tmp_path):
    rows = [
        {"prompt": "b", "completions": ["c", "d", "e"], "labels": [True, False, True]},
        {"prompt": "f", "completions": ["g"], "labels": [False]},
    ]
    found = formats.steps(written(rows, tmp_path, kind), TOKENIZER)
    np.testing.assert_array_equal(found.labels, [[1, 0, 1], [0, np.nan, np.nan]])
    step_ids = process.find_step_ids(TOKENIZER, "\n")
    options = {"epochs": 1, "lr": 1e-3, "lora_rank": 2, "seed": (0,), "responses_per_batch": 2}
    model, records = process.train(classifier(TOKENIZER), [found], step_ids=step_ids, **options)
    scores = process.ProcessRewardModel(model, TOKENIZER, step_ids).step_scores(found.sequences)
    assert [len(part) for part in scores] == [3, 1] and np.isfinite(records[0]["loss"])


def test_pairs_are_trained_on():
    options = {"epochs": 1, "lr": 1e-3, "lora_rank": 2, "seed": (0,), "prompts_per_batch": 2, "readout": "last"}
    _, records = outcome.train(classifier(TOKENIZER), [formats.preferences(TEXTS, TOKENIZER)], **options)
    assert np.isfinite(records[0]["loss"])


GOOD = {"prompt": "b", "chosen": "c", "rejected": "d"}


@pytest.mark.parametrize(
    ("read", "row", "words"),
    [
        (formats.preferences, {"prompt": "b", "chosen": "c"}, "row 1: rejected: needs a text"),
        (formats.preferences, GOOD | {"chosen": ""}, "row 1: chosen: needs a text"),
        (formats.preferences, GOOD | {"chosen": [{"role": "user"}]}, "row 1: chosen: needs a text"),
        (formats.preferences, GOOD | {"chosen": said("c")}, "row 1: the prompt is a text, its completion messages"),
        (formats.preferences, {"chosen": "c", "rejected": "d"}, "row 1: chosen and rejected do not begin alike"),
        (formats.preferences, GOOD | {"rejected": "c"}, "row 1: chosen and rejected are the same"),
        (formats.preferences, {"chosen": "c", "rejected": said("d")}, "row 1: chosen and rejected: one is a text"),
        (
            formats.preferences,
            {"prompt": ASKED, "chosen": ASKED, "rejected": "d"},
            "row 1: after the prompt",
        ),
        (formats.preferences, ["b", "c"], "row 1: is a list, not fields"),
        (formats.correctness, {"prompt": "b", "completion": "c", "label": 2}, "row 1: label 2 is neither 0 nor 1"),
        (formats.correctness, {"prompt": "b", "completion": "c"}, "row 1: label None"),
        (formats.steps, {"prompt": "b", "completions": ["c"], "labels": [1, 0]}, "row 1: needs completions and labels"),
        (
            formats.steps,
            {"prompt": "b", "completions": ["c\nd"], "labels": [1]},
            "row 1: step 'c.nd' is empty",
        ),
    ],
)
def test_bad_rows_are_named(read, row, words):
    first = {
        formats.preferences: GOOD,
        formats.correctness: {"prompt": "b", "completion": "c", "label": 1},
        formats.steps: {"prompt": "b", "completions": ["c"], "labels": [1]},
    }[read]
    with pytest.raises(ValueError, match=words):
        read([first, row], TOKENIZER)


def test_bad_files_are_named(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "b"\n')
    with pytest.raises(ValueError, match=rf"{file}, row 0: no JSON"):
        formats.preferences(file, TOKENIZER)
    file.write_text("\n")
    with pytest.raises(ValueError, match=rf"{file}, no row"):
        formats.preferences(file, TOKENIZER)
    with pytest.raises(ValueError, match="must end in .jsonl or .parquet"):
        formats.preferences(tmp_path / "data.csv", TOKENIZER)
