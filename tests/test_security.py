"""Untrusted text and files: nothing is evaluated or unpickled, every parser survives what a model may write, and
parameter files that make no sense are refused by name before anything is computed."""

import ast
import random
import string
import time
from pathlib import Path

import pytest
import yaml

import rlhfscale.claims  # noqa: F401  (registers the figures)
from rlhfscale.bed import tasks
from rlhfscale.bed.responses import decode
from rlhfscale.chat import reasoning
from rlhfscale.evals import arena_hard, mt_bench, verifiers
from rlhfscale.evals.benchmarks import _fill
from rlhfscale.study import params, runner, strict_yaml
from rlhfscale.study.params import ParamsError

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lib").rglob("*.py"))
NUM_COMPLETIONS, NUM_FILES = 1200, 240
LIMIT_S = 0.25
"""For one parser on one completion of at most 20,000 characters."""

# --- what the code may not do ---

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_NAMES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


def _calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_module_evaluates_or_unpickles(path):
    tree = ast.parse(path.read_text())
    for call in _calls(tree):
        name = getattr(call.func, "id", None)
        assert name not in FORBIDDEN_CALLS, f"{path}:{call.lineno} calls {name}"
        owner, attribute = getattr(getattr(call.func, "value", None), "id", ""), getattr(call.func, "attr", "")
        assert (owner, attribute) not in {("os", "system"), ("torch", "load"), ("yaml", "unsafe_load")}, call.lineno
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        shell = keywords.get("shell")
        assert shell is None or shell.value is False, f"{path}:{call.lineno} runs a shell"
        trusted = keywords.get("trust_remote_code")
        assert trusted is None or trusted.value is False, f"{path}:{call.lineno} trusts remote code"
        if (owner, attribute) == ("np", "load"):
            allowed = keywords.get("allow_pickle")
            assert allowed is None or allowed.value is False, f"{path}:{call.lineno} may unpickle"
        if (owner, attribute) == ("yaml", "load"):
            assert ast.unparse(keywords["Loader"]) == "_Loader", "a safe loader"
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & FORBIDDEN_NAMES, f"{path} imports {imported & FORBIDDEN_NAMES}"


def test_the_parameter_files_loader_is_a_safe_one(tmp_path):
    assert issubclass(strict_yaml._Loader, yaml.SafeLoader)
    file = tmp_path / "01_policy_size.yaml"
    file.write_text("recipe: !!python/object/apply:os.system ['touch broken']\n")
    with pytest.raises(ParamsError, match="a tag .* is not allowed"):
        params.load(file)


# --- hostile completions ---

FRAGMENTS = [
    "", " ", "\n", "\x00", "\ufeff", "\u202e", "\ud7ff", "𝟙𝟚", "٣", "½", "∞", "nan", "inf", "-inf", "1e999", "0x1F",
    "1_000", "1" * 4000, "9" * 5000 + "." + "9" * 5000, "-" * 3000, "." * 3000, "," * 3000, "a" * 20000,
    ";" * 5000, "$" * 3000, "__import__('os').system('true')", "${7*7}", "{{7*7}}", "%s%n", "'; DROP TABLE runs; --",
    "<script>alert(1)</script>", "<|im_end|>", "<eos>", "</s>", "10**10**10", "9**9**9**9", "factorial(99999)",
    "(" * 3000, "(a+)+$" * 300,
    "\\boxed{", "\\boxed{}", "\\boxed{" * 800, "}" * 3000, "\\fbox{\\boxed{1}}", "\\frac{" * 500, "\\sqrt" * 500,
    "^" * 3000, "%" * 3000, "\\text{ ", "\\left\\right" * 300, "####", "#### 1,2,3.", "A:", "A: " + "9" * 3000,
    "[[A]]", "[[B]]", "[[C]]", "[[A>B]]", "[[A>>B]]", "[[A=B]]" * 700, "[[", "]]", "[[[[[[5]]]]]]", "[[" * 4000,
    "Rating: [[5]]", "Rating: [[11]]", "Rating: [[-3.5]]", "Rating: [[nan]]",
    "; ; ;", " ; ", "a b c ; d", "lists reverse : a =", "= = =",
]  # fmt: skip


def completions():
    """Fragments alone, joined at random, and random characters."""
    rng = random.Random(0)
    yield from FRAGMENTS
    for _ in range(NUM_COMPLETIONS - len(FRAGMENTS)):
        if rng.random() < 0.3:
            alphabet = rng.choice([string.printable, "[]{}()\\^_$;:#=,. 0123456789", "\u0000\u0301\u200d😀é\n "])
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 3000)))
        else:
            text = rng.choice(["", " ", "\n"]).join(rng.choices(FRAGMENTS, k=rng.randint(1, 6)))
        yield text[:20000]


def parsers():
    problem = next(tasks.problems((0, 0), "train"))
    yield "the bed's verifier", lambda text: tasks.grade(problem, text)
    yield "gsm8k", lambda text: verifiers.gsm8k_correct(text, "#### 12")
    yield "number", lambda text: verifiers.number_correct(text, "12")
    yield "boxed", lambda text: verifiers.normal_form((verifiers.last_boxed(text) or "")[:2000])
    yield "MT-Bench score", mt_bench.parse_score
    yield "MT-Bench pair", mt_bench.parse_pair
    yield "MT-Bench score beside its answers", lambda text: mt_bench.score_of(text, [text[:50]])
    yield "MT-Bench pair beside its answers", lambda text: mt_bench.pair_of(text, [text[:50]])
    yield "Arena-Hard v0.1", lambda text: arena_hard.parse_verdict(text, "v0.1")
    yield "Arena-Hard v2.0", lambda text: arena_hard.parse_verdict(text, "v2.0")
    yield "Arena-Hard style", lambda text: arena_hard.style_counts(text, 10)
    yield "a judge's prompt", lambda text: _fill("{question} {answer}", {"question": text, "answer": text})
    yield "the answer in a response", reasoning.answer_in


@pytest.mark.parametrize(("name", "parse"), list(parsers()), ids=lambda value: value if isinstance(value, str) else "")
def test_hostile_completions_are_parsed_in_time(name, parse):
    slowest, count = 0.0, 0
    for text in completions():
        start = time.process_time()
        parse(text)
        slowest, count = max(slowest, time.process_time() - start), count + 1
    assert count >= 1000
    assert slowest < LIMIT_S, f"{name} took {slowest:.2f} s"


def test_hostile_answers_to_reasoning_questions_are_graded():
    pytest.importorskip("reasoning_gym")
    for task in reasoning.TASKS:
        (question,) = reasoning.questions(task, "train", 1, 0)
        for text in completions():
            start = time.process_time()
            assert reasoning.grade(question, text) in (True, False)
            assert time.process_time() - start < LIMIT_S


def test_any_tokens_decode():
    for ids in ([], [0], [1, 2], list(range(40)) * 50):
        assert isinstance(decode(ids), str)


# --- parameter files ---

WRONG = [
    None, True, -1, 0, 10**12, 1.5, float("nan"), float("inf"), "", "x", "../../etc", "14K", "\u202e", "1e-4", [], [[]],
    [None], ["x"], [-1, -1], [1, 1], ["14k", "14k"], {}, {"a": 1}, "!!python/name:os.system",
]  # fmt: skip


def mutated():
    """Committed parameter files with one value replaced, a key misspelt, taken away or added."""
    rng = random.Random(1)
    files = sorted((ROOT / "params/smoke").glob("[0-9][0-9]_*.yaml"))
    for number in range(4 * NUM_FILES):
        path = files[number % len(files)]
        values = yaml.safe_load(path.read_text()) or {}
        if not values:
            continue
        name, kind = rng.choice(sorted(values)), rng.choice(["value", "value", "value", "misspelt", "missing", "extra"])
        if kind == "value":
            values[name] = rng.choice(WRONG)
        elif kind == "misspelt":
            values[name + "s"] = values.pop(name)
        elif kind == "missing":
            del values[name]
        else:
            values["extra_key"], name = 1, "extra_key"
        yield path.name, kind, name, values


def refusal(path: Path) -> str | None:
    """What a parameter file is refused with, or None."""
    try:
        params.load(path).specs()
    except (ParamsError, ValueError) as error:  # the second: a spec's own rule, which `runner.load_figures` words
        return " ".join(str(error).split())
    return None


def test_senseless_parameter_files_are_refused_by_name(tmp_path, monkeypatch):
    """Those that still make sense are left out: a value may be replaced by another that is allowed."""
    monkeypatch.setenv("RLHFSCALE_STORE", str(tmp_path / "store"))
    refused = 0
    for index, (file, kind, name, values) in enumerate(mutated()):
        path = tmp_path / str(index) / file
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(values))
        message = refusal(path)
        if message is None:
            assert kind == "value", (file, kind, name)
            continue
        assert name in message and "\n" not in message, (file, kind, name, values.get(name), message)
        refused += 1
        if refused == NUM_FILES:
            break
    assert refused >= 200
    assert not (tmp_path / "store").exists(), "nothing may be computed"


@pytest.mark.parametrize("name", ["../01_policy_size", "/etc/passwd", "01_policy_size/..", "..", "01/../../x"])
def test_names_from_the_command_line_cannot_leave_their_folders(name):
    with pytest.raises(ParamsError):
        runner.figure_names("smoke", [name])
    with pytest.raises(ParamsError):
        runner.figure_names(f"smoke/../{name}/nowhere")
