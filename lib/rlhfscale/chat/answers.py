"""A language model's responses to questions, graded: what the real-model stages hand to each other."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rlhfscale.chat import reasoning
from rlhfscale.chat.reasoning import Question
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards.base import Reward
from rlhfscale.rewards.conversations import same_tokens
from rlhfscale.rewards.labelled import Labelled
from rlhfscale.samplers.base import Completions

QUESTIONS, RESPONSES = "questions.json", "responses.safetensors"
ARRAYS = ("ids", "lengths", "finished", "right", "bare")
DATE = "26 Jul 2024"
"""The day that every conversation is held on: Llama 3.1's templates have this one by default, those of 3.2 the day on
which they are run, which would make each day's prompts another text."""


@dataclass(frozen=True)
class Answers:
    """Responses to questions, the same number to each.

    Attributes:
        questions: one for each row.
        ids: int32 [question, sample, length], padded on the right with anything.
        lengths: int32 [question, sample], end-of-sequence included.
        finished: bool [question, sample], ended by end-of-sequence.
        right: bool [question, sample], by `reasoning.grade`.
        bare: bool [question, sample], by `reasoning.is_bare`.
    """

    questions: tuple[Question, ...]
    ids: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    right: np.ndarray
    bare: np.ndarray

    @classmethod
    def graded(
        cls, questions: Sequence[Question], completions: Completions, tokenizer: PreTrainedTokenizerBase
    ) -> "Answers":
        """From completions, the samples of one question in a row."""
        shape = (len(questions), len(completions) // len(questions))
        texts = decode(completions.ids, completions.lengths, tokenizer)
        asked = [question for question in questions for _ in range(shape[1])]
        pairs = list(zip(asked, texts, strict=True))
        return cls(
            questions=tuple(questions),
            ids=completions.ids.reshape(*shape, -1),
            lengths=completions.lengths.astype(np.int32).reshape(shape),
            finished=completions.finished.reshape(shape),
            right=np.array([reasoning.grade(*pair) for pair in pairs]).reshape(shape),
            bare=np.array([reasoning.is_bare(*pair) for pair in pairs]).reshape(shape),
        )

    @property
    def tasks(self) -> np.ndarray:
        """str [question], each question's task."""
        return np.array([question.task for question in self.questions])

    @property
    def num_prompts(self) -> int:
        return self.right.shape[0]

    @property
    def num_samples(self) -> int:
        return self.right.shape[1]

    @property
    def exact(self) -> np.ndarray:
        """bool [question, sample]: as `Responses` call it."""
        return self.right

    @property
    def gold(self) -> np.ndarray:
        """float32 [question, sample]: 1 for a right answer, else 0; a number has no parts that could be right."""
        return self.right.astype(np.float32)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths

    def head(self, num_prompts: int) -> "Answers":
        """The answers to the first questions of each task."""
        seen: Counter[str] = Counter()
        kept = []
        for row, question in enumerate(self.questions):
            if seen[question.task] < num_prompts:
                kept.append(row)
            seen[question.task] += 1
        arrays = {name: getattr(self, name)[kept] for name in ARRAYS}
        return Answers(tuple(self.questions[row] for row in kept), **arrays)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """str [question, sample], special tokens left out."""
        flat = decode(self.ids.reshape(-1, self.ids.shape[-1]), self.lengths.reshape(-1), tokenizer)
        return np.array(flat, object).reshape(self.lengths.shape)

    def answers(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """int64 [question, sample]: equal numbers for equal final answers to a question; -1 for unfinished responses
        and for those without a number."""
        numbers = np.full(self.right.shape, -1, np.int64)
        for row, texts in enumerate(self.texts(tokenizer)):
            seen: dict[str, int] = {}
            for sample, text in enumerate(texts):
                final = reasoning.answer_in(text)
                if final and self.finished[row, sample]:
                    numbers[row, sample] = seen.setdefault(final, len(seen))
        return numbers

    def sequences(self, tokenizer: PreTrainedTokenizerBase) -> Sequences:
        """Conversations joined with their responses, [question x sample], in the tokens that the model wrote."""
        prompts = [ids for ids in encode(self.questions, tokenizer) for _ in range(self.num_samples)]
        rows = zip(self.ids.reshape(-1, self.ids.shape[-1]), self.lengths.reshape(-1), strict=True)
        return Sequences.join(prompts, [row[:length] for row, length in rows], self.finished.reshape(-1), tokenizer)

    def reworded(self, written: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> "Answers":
        """The same answers in another model's tokens.

        Args:
            written: of the model that wrote them.
        """
        if same_tokens(written, tokenizer):
            return self
        texts = self.texts(written).reshape(-1)
        rows = encode_responses(texts, self.finished.reshape(-1), tokenizer)
        ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
        for place, row in zip(ids, rows, strict=True):
            place[: len(row)] = row
        lengths = np.array([len(row) for row in rows], np.int32).reshape(self.lengths.shape)
        return replace(self, ids=ids.reshape(*lengths.shape, -1), lengths=lengths)

    def labelled(self, tokenizer: PreTrainedTokenizerBase) -> Labelled:
        """For a reward model: a question's responses are a group, a right one is better than a wrong one."""
        group = np.repeat(np.arange(len(self.questions)), self.lengths.shape[1])
        right = self.right.reshape(-1).astype(np.float32)
        return Labelled(self.sequences(tokenizer), group, right, right)

    def accepted(self, tokenizer: PreTrainedTokenizerBase) -> Sequences:
        """Rejection sampling: the questions with a right answer among the samples, each with that answer alone.

        The words around a right answer are dropped, since the conversation asks for the answer only.
        """
        kept = [question for question, right in zip(self.questions, self.right, strict=True) if right.any()]
        rows = [[*tokenizer.encode(q.answer, add_special_tokens=False), tokenizer.eos_token_id] for q in kept]
        return Sequences.join(encode(kept, tokenizer), rows, np.ones(len(kept), bool), tokenizer)

    def save(self, folder: Path) -> None:
        rows = reasoning.to_rows(self.questions)
        (folder / QUESTIONS).write_text(json.dumps(rows, indent=0, ensure_ascii=False) + "\n")
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}, folder / RESPONSES)

    @classmethod
    def load(cls, folder: Path) -> "Answers":
        rows = json.loads((folder / QUESTIONS).read_text())
        return cls(tuple(Question(**row) for row in rows), **load_file(folder / RESPONSES))


class Asked:
    """Which question a sequence's prompt asks.

    Args:
        questions: all that can be asked.
        tokenizer: of the sequences.
    """

    def __init__(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase):
        self._by_prompt = {tuple(p): q for p, q in zip(encode(questions, tokenizer), questions, strict=True)}

    def __call__(self, sequences: Sequences) -> list[Question]:
        """The question of each sequence. Raises KeyError for a prompt that is none of the questions."""
        rows = zip(sequences.ids, sequences.prompt_lengths, strict=True)
        return [self._by_prompt[tuple(row[:length].tolist())] for row, length in rows]


class Verifier:
    """A reward: 1 for a right answer to one of these questions, else 0.

    Args:
        questions: all that can be asked.
        tokenizer: of the sequences.
    """

    def __init__(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase):
        self._asked = Asked(questions, tokenizer)

    def score(self, sequences: Sequences) -> np.ndarray:
        """float32 [sequence]. Raises KeyError for a prompt that is none of the questions."""
        answered = zip(self._asked(sequences), sequences.responses, strict=True)
        return np.array([reasoning.grade(*pair) for pair in answered], np.float32)


class Reworded:
    """A reward model of another checkpoint than the policy's: it gets question and answer in its own chat template and
    tokens.

    Args:
        reward: scores sequences of its own tokens.
        own: tokenizer of the reward model.
        questions: all that can be asked.
        tokenizer: of the sequences.
    """

    def __init__(
        self,
        reward: Reward,
        own: PreTrainedTokenizerBase,
        questions: Sequence[Question],
        tokenizer: PreTrainedTokenizerBase,
    ):
        self._reward, self._own, self._asked = reward, own, Asked(questions, tokenizer)

    def score(self, sequences: Sequences) -> np.ndarray:
        """float32 [sequence]. Raises KeyError for a prompt that is none of the questions."""
        prompts = encode(self._asked(sequences), self._own)
        rows = encode_responses(sequences.responses, sequences.finished, self._own)
        return self._reward.score(Sequences.join(prompts, rows, sequences.finished, self._own))


def encode(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each question as a conversation, ready to be answered. Templates that tell the date get `DATE`."""
    options = {"add_generation_prompt": True, "return_dict": True, "date_string": DATE}
    return [list(tokenizer.apply_chat_template(q.conversation, **options)["input_ids"]) for q in questions]


def encode_responses(texts: Sequence[str], finished: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of responses, closed where they are ``finished`` (bool [response]), or where else nothing would be
    left."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [[*row, *end] if done or not row else list(row) for row, done in zip(rows, finished, strict=True)]


def decode(ids: np.ndarray, lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of responses [response, length], special tokens left out."""
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
