"""A language model's responses to questions, graded: what the real-model stages hand to each other."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from rlhfscale.rewards.labelled import Labelled
from rlhfscale.samplers.base import Completions
from rlhfscale.sequences import Sequences
from rlhfscale.tasks import reasoning
from rlhfscale.tasks.reasoning import Question

QUESTIONS, RESPONSES = "questions.json", "responses.safetensors"


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

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """str [question, sample], special tokens left out."""
        flat = decode(self.ids.reshape(-1, self.ids.shape[-1]), self.lengths.reshape(-1), tokenizer)
        return np.array(flat, object).reshape(self.lengths.shape)

    def sequences(self, tokenizer: PreTrainedTokenizerBase) -> Sequences:
        """Conversations joined with their responses, [question x sample]."""
        prompts = [ids for ids in encode(self.questions, tokenizer) for _ in range(self.lengths.shape[1])]
        rows = zip(self.ids.reshape(-1, self.ids.shape[-1]), self.lengths.reshape(-1), strict=True)
        return Sequences.join(prompts, [row[:length] for row, length in rows], self.finished.reshape(-1), tokenizer)

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
        names = ("ids", "lengths", "finished", "right", "bare")
        save_file({name: np.ascontiguousarray(getattr(self, name)) for name in names}, folder / RESPONSES)

    @classmethod
    def load(cls, folder: Path) -> "Answers":
        rows = json.loads((folder / QUESTIONS).read_text())
        return cls(tuple(Question(**row) for row in rows), **load_file(folder / RESPONSES))


class Verifier:
    """A reward: 1 for a right answer to one of these questions, else 0.

    Args:
        questions: all that can be asked.
        tokenizer: of the sequences.
    """

    def __init__(self, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._by_prompt = {tuple(p): q for p, q in zip(encode(questions, tokenizer), questions, strict=True)}

    def score(self, sequences: Sequences) -> np.ndarray:
        """float32 [sequence]. Raises KeyError for a prompt that is none of the questions."""
        prompts = [tuple(row[:n].tolist()) for row, n in zip(sequences.ids, sequences.prompt_lengths, strict=True)]
        answered = zip(prompts, sequences.responses, strict=True)
        return np.array([reasoning.grade(self._by_prompt[prompt], text) for prompt, text in answered], np.float32)


def encode(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each question as a conversation, ready to be answered."""
    return [
        list(tokenizer.apply_chat_template(q.conversation, add_generation_prompt=True, return_dict=True)["input_ids"])
        for q in questions
    ]


def decode(ids: np.ndarray, lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of responses [response, length], special tokens left out."""
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
