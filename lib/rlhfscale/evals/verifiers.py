"""Graders of final answers, for GSM8K and MATH, and what to make of many samples.

What a model wrote is untrusted: answers are compared as text or numbers here, and where algebra is needed
(`MathGrader`) by math-verify in a process of its own that is killed when its time is up.
"""

import json
import os
import re
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from rlhfscale.evals.best_of_n import pass_at_n

MAX_ANSWER_CHARS = 2000
"""A longer final answer is wrong without being looked at."""
_FINAL = re.compile(r"^(?:####|A:)\s{0,100}(-?[0-9.,]+)", re.MULTILINE)
_BOX = re.compile(r"\\f?box(?:ed)?(?:\s*\{|\s+[^\s{])")
_UNIT = re.compile(r"\s*\\(?:text|mathrm|mbox)\{\s*([a-zA-Z./ ]{2,40}?)\s*\}(\^\{?[23]\}?)?\s*$")
_NUMBER = re.compile(r"-?(?:\d{1,50}(?:\.\d{0,50})?|\.\d{1,50})")


# GSM8K.


def gsm8k_answer(solution: str) -> str | None:
    """The number after the last ``####`` or ``A:`` that begins a line, without commas and a final dot; None if none."""
    found = _FINAL.findall(solution)
    return found[-1].replace(",", "").rstrip(".") if found else None


def gsm8k_correct(solution: str, gold: str) -> bool:
    """Whether a solution's final number is that of the gold solution, compared as text.

    Raises:
        ValueError: the gold solution has no final number.
    """
    wanted = gsm8k_answer(gold)
    if wanted is None:
        raise ValueError(f"gold solution without a final number: ...{gold[-60:]!r}")
    return gsm8k_answer(solution) == wanted


def number(text: str) -> Fraction | None:
    """A plain number, also with thousands' commas, a dollar or percent sign; None for anything else."""
    plain = text.strip().replace(",", "").strip("$% ")
    return Fraction(plain) if len(plain) <= 100 and _NUMBER.fullmatch(plain) else None


def number_correct(answer: str, gold: str, *, tolerance: float = 1e-4, percent: bool = True) -> bool:
    """Whether two numbers agree within a tolerance relative to the gold one, in exact arithmetic; with ``percent`` (as
    ToRA) also as gold / 100 or gold * 100."""
    ours, wanted = number(answer), number(gold)
    if ours is None or wanted is None:
        return answer.strip() == gold.strip()
    wishes = (wanted, wanted / 100, wanted * 100) if percent else (wanted,)
    return any(abs(ours - wish) <= Fraction(tolerance) * abs(wish) for wish in wishes)


# MATH.


def last_boxed(solution: str) -> str | None:
    """The content of the last ``\\boxed{...}`` (or ``\\fbox``), its braces matched; None if none is complete. Without
    braces, what follows up to a dollar sign or the end of the line."""
    found = list(_BOX.finditer(solution))
    if not found:
        return None
    start = found[-1].end() - 1
    if solution[start] != "{":  # \boxed 5
        return re.split(r"[$\n]", solution[start:], maxsplit=1)[0].strip().rstrip(".") or None
    depth = 0
    for place in range(start, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[place], 0)
        if depth == 0:
            return solution[start + 1 : place].strip()
    return None


def normal_form(answer: str) -> str:
    """An answer's LaTeX without what leaves its meaning alone: spacing, units, degrees, the size of brackets, ways to
    write a fraction or a root (the rules of Hendrycks et al. 2021)."""
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "").replace("$", "")
    if "\\text{ " in text:
        text = text.split("\\text{ ")[0]  # units on the right
    text = text.replace("\\%", "").replace("%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left.strip()) <= 2:
        text = right  # x = 5
    text = re.sub(r"(?<!\d) | (?!\d)", "", re.sub(r"\\sqrt\s?(\w)", r"\\sqrt{\1}", text))  # 2 1/2 is not 21/2
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\w)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]{1,200}\})(\w)", r"\1{\2}", text)
    text = re.sub(r"^(-?\d{1,50})/(-?\d{1,50})$", r"\\frac{\1}{\2}", text)
    return "\\frac{1}{2}" if text == "0.5" else text.rstrip(".")


def unit(answer: str) -> str:
    """The unit that ends an answer, such as ``\\text{ cm}^2``, in lower case and the singular; "" without one."""
    found = _UNIT.search(answer)
    if not found or not re.search(r"\d|\}", answer[: found.start()]):
        return ""
    singular = re.sub(r"(?<=ch)es$|s$", "", found[1].lower().replace(".", ""))
    return singular + (found[2] or "").strip("^{}")


def without_unit(answer: str) -> str:
    """An answer without the unit that ends it."""
    return _UNIT.sub("", answer) if unit(answer) else answer


@dataclass(frozen=True)
class Grade:
    """Whether an answer is right, and for a wrong one why: ``differs``, ``no answer``, ``too long``, ``timeout``,
    ``error``, or ``undecided``: math-verify says equal, and `algebra` cannot confirm it."""

    correct: bool
    reason: str = ""


class MathGrader:
    """Grades MATH answers: equal in `normal_form`, or equal to math-verify and by `algebra`; two rational numbers by
    `algebra` alone, exactly. Units are left out unless both answers have one and they are different.

    Args:
        timeout_s: for one answer; then its process is killed, the answer is wrong and counted as a timeout.
        memory_mib: limit of that process.

    Use it as a context manager, or call `close`. Not for several threads at once.
    """

    def __init__(self, timeout_s: float = 5.0, memory_mib: int = 4096):
        self.timeout_s, self.memory_mib = timeout_s, memory_mib
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "MathGrader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade(self, solution: str, gold: str) -> Grade:
        """Grade a solution's last boxed answer against a gold answer (or a gold solution with a boxed one)."""
        answer, wanted = last_boxed(solution), last_boxed(gold) or gold
        if answer is None:
            return Grade(False, "no answer")
        if len(answer) > MAX_ANSWER_CHARS:
            return Grade(False, "too long")
        units = {unit(answer), unit(wanted)} - {""}
        if len(units) > 1:
            return Grade(False, "differs")
        if normal_form(answer) == normal_form(wanted):
            return Grade(True)
        return self.equal(answer, wanted)

    def equal(self, answer: str, gold: str) -> Grade:
        """Whether two answers, in LaTeX without dollar signs, are equal; see `algebra.judge`.

        Raises:
            ModuleNotFoundError: math-verify is not installed.
        """
        process = self._process or self._start()
        try:
            process.stdin.write(json.dumps([without_unit(answer), without_unit(gold)]).encode() + b"\n")
            process.stdin.flush()
            reply = self._line(process)
        except BrokenPipeError:
            reply = b""
        if reply is None:
            self.close()
            return Grade(False, "timeout")
        if not reply:  # it died, for example for lack of memory
            self.close()
            return Grade(False, "error")
        verdict = json.loads(reply)
        return Grade(verdict == "equal", "" if verdict == "equal" else verdict)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _line(self, process: subprocess.Popen[bytes], timeout_s: float | None = None) -> bytes | None:
        """The next line, None if the time is up."""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(self.timeout_s if timeout_s is None else timeout_s)
        return process.stdout.readline() if ready else None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rlhfscale.evals.algebra", str(self.memory_mib)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        if self._line(self._process, timeout_s=60.0) != b"ready\n":
            self.close()
            raise ModuleNotFoundError("graders need math-verify; install it with: make setup EXTRAS=judge")
        return self._process


# Many samples.


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, by `normal_form`; among equals the one seen first; None where there is no answer."""
    given = [answer for answer in answers if answer is not None]
    if not given:
        return None
    votes = Counter(map(normal_form, given))
    winner = max(votes, key=votes.get)
    return next(answer for answer in given if normal_form(answer) == winner)


def accuracies(correct: Any, voted: Any, sizes: Sequence[int]) -> dict[str, float]:
    """Mean accuracy, unbiased pass@k and majority vote over problems.

    Args:
        correct: bool [problem, sample].
        voted: bool [problem], whether the majority of all samples is right.
        sizes: values of k, each at most the number of samples.
    """
    correct = np.asarray(correct, dtype=float)
    found = pass_at_n(correct, sizes).mean(0)
    rates = {f"pass@{k}": float(value) for k, value in zip(sizes, found, strict=True)}
    return {"accuracy": float(correct.mean()), **rates, f"majority@{correct.shape[1]}": float(np.mean(voted))}
