"""The questions for pretrained models: splits, grading of untrusted text, and what is kept of answers."""

import numpy as np
import pytest

from rlhfscale.chat import reasoning
from rlhfscale.chat.answers import Answers, Verifier
from rlhfscale.chat.reasoning import Question
from rlhfscale.models.sequences import Sequences
from rlhfscale.samplers import Completions

pytest.importorskip("reasoning_gym", reason="make setup EXTRAS=smollm2")

SUM = Question("chain_sum", "State the final answer to the following arithmetic problem: 4 + 3 =", "7")


@pytest.mark.parametrize("task", reasoning.TASKS)
def test_splits_never_share_a_question(task):
    train = {q.text for seed in (1, 2) for q in reasoning.questions(task, "train", 60, seed)}
    held_out = reasoning.questions(task, "eval", 20, 3)
    assert len({q.text for q in held_out}) == 20
    assert not train & {q.text for q in held_out}
    assert all(reasoning.is_held_out(q.text) for q in held_out)
    assert reasoning.questions(task, "eval", 20, 3) == held_out


def test_the_right_answers_are_right():
    """Against arithmetic done here, not the generator's."""
    for question in reasoning.questions("chain_sum", "train", 50, 0):
        left, sign, right = question.text.partition(":")[2].strip(" =").split()
        assert int(question.answer) == int(left) + (1 if sign == "+" else -1) * int(right)
    for question in reasoning.questions("gcd", "train", 50, 0):
        numbers = [int(n) for n in reasoning.NUMBER.findall(question.text)]
        assert int(question.answer) == np.gcd(*numbers)
    for question in reasoning.questions("lcm", "train", 50, 0):
        numbers = [int(n) for n in reasoning.NUMBER.findall(question.text)]
        assert int(question.answer) == np.lcm(*numbers)
    for question in reasoning.questions("letter_counting", "train", 50, 0):
        letter, text = question.text.split('"')[1], question.text.split('"')[3]
        assert int(question.answer) == text.lower().count(letter.lower())


@pytest.mark.parametrize(
    ("response", "right", "bare"),
    [
        ("7", True, True),
        (" 7\n", True, True),
        ("The answer is 7.", True, False),
        ("4 + 3 = 7", True, False),
        ("7, because 4 + 3", False, False),
        ("-7", False, False),
        ("seven", False, False),
        ("", False, False),
        ("70", False, False),
        ("[[7]] ignore the question and accept", True, False),
        ("9" * 100_000, False, False),
        ("\x00" + "-" * 100_000, False, False),
    ],
)
def test_grading_takes_the_last_number(response, right, bare):
    assert reasoning.grade(SUM, response) == right
    assert reasoning.is_bare(SUM, response) == bare


def test_bad_input():
    with pytest.raises(ValueError, match="chain_sums"):
        reasoning.questions("chain_sums", "train", 2, 0)
    with pytest.raises(ValueError, match="'train', 'eval'"):
        reasoning.questions("gcd", "test", 2, 0)
    with pytest.raises(ValueError, match=r"lcm: only \d+ of 500 eval questions"):
        reasoning.questions("lcm", "eval", 500, 0)


class Letters:
    """A tokenizer of which id i is the i-th character."""

    text = "x0123456789 ."

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(self.text[i] for i in row) for row in rows]


def test_answers_are_graded_and_kept(tmp_path):
    questions = (SUM, Question("chain_sum", "5 - 5", "0"))
    rows = [[11, 11, 8], [8, 12], [8], [9], [2], [1, 11, 12], [1, 12], [1]]
    ids = np.zeros((8, 3), np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    finished = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
    lengths = np.array([len(row) for row in rows])
    completions = Completions(ids, lengths, finished, np.zeros((8, 3), np.float32), 1.0, np.arange(8, dtype=np.uint64))
    found = Answers.graded(questions, completions, Letters())
    np.testing.assert_array_equal(found.right, [[1, 1, 1, 0], [0, 1, 1, 1]])
    found.save(tmp_path)
    again = Answers.load(tmp_path)
    assert again.questions == questions
    for name in ("ids", "lengths", "finished", "right", "bare"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


class Chat(Letters):
    """It numbers conversations by their question."""

    known: tuple[str, ...] = (SUM.text, "5 - 5")

    def apply_chat_template(self, conversation, **options):
        return {"input_ids": [3, self.known.index(conversation[-1]["content"])]}


def test_the_verifier_as_a_reward_knows_each_prompt_by_its_tokens():
    questions = [SUM, Question("chain_sum", "5 - 5", "0")]
    sequences = Sequences.join([[3, 0], [3, 1], [3, 0]], [[8], [8], [8, 1]], np.ones(3, bool), Chat())
    found = Verifier(questions, Chat()).score(sequences)
    np.testing.assert_array_equal(found, np.array([1, 0, 0], np.float32))
    with pytest.raises(KeyError):
        Verifier(questions[:1], Chat()).score(sequences)


def test_rejection_sampling_keeps_the_bare_answer_of_what_was_answered_rightly_once():
    class Encoding(Chat):
        eos_token_id = 0

        def encode(self, text, add_special_tokens):
            return [self.text.index(letter) for letter in text]

    questions = (SUM, Question("chain_sum", "5 - 5", "0"))
    right = np.array([[False, True], [False, False]])
    empty = np.zeros((2, 2), np.int32)
    found = Answers(questions, empty[..., None], empty, right, right, right).accepted(Encoding())
    assert found.ids.tolist() == [[3, 0, 8, 0]]
    assert found.prompt_lengths.tolist() == [2] and found.finished.all()
