"""Whether two answers in LaTeX are equal: math-verify's verdict, which a second check must confirm.

math-verify compares numbers by six digits and leaves out what it cannot read, so it calls 1/2004! and 1/2006! equal,
and 1 - 1/e and 1 + 1/e. Here two rational numbers are compared exactly. Of other answers math-verify's parser must have
read the whole text, and what it read must be equal part by part: lists by their members, intervals with their ends, and
expressions to 50 digits, with variables at random points of both signs.
"""

import json
import random
import re
import sys
from fractions import Fraction
from itertools import pairwise
from typing import Any

from rlhfscale.evals.verifiers import normal_form

DIGITS = 50
PLAIN = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?")
EXPONENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(?:[eE]|\\(?:times|cdot)\s*10\s*\^)\s*\{?([-+]?\d{1,4})\}?")
MIXED = re.compile(r"(-?)(\d+)\s+(\d+)/(\d+)|(-?)(\d+)\s*\\[dt]?frac\{?(\d+)\}?\{?(\d+)\}?")
REPEATING = re.compile(r"(-?\d*\.\d*)\\overline\{(\d{1,50})\}")
FRACTION = re.compile(r"(-?)(?:(\d+)/(\d+)|\\[dt]?frac(?:\{(-?\d+)\}|(\d))(?:\{(-?\d+)\}|(\d)))")
THOUSANDS = re.compile(r"\{,\}|(?<=\d)\\[,!](?=\d{3})")
BASE = re.compile(r"[\dA-F]+_\{?\d+\}?")
TIME = re.compile(r"\d{1,2}:\d\d(:\d\d)?")
NAMES = re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf)\{\s*\(?(\w)\)?\s*\}")
"""One letter in another face."""


class Unreadable(ValueError):
    """An answer that cannot be read whole."""


def rational(answer: str) -> Fraction | None:
    """An answer that is a decimal, also with thousands' commas, an exponent, a percent sign or digits that repeat for
    ever; a fraction of integers; or a mixed number. Else None."""
    text = THOUSANDS.sub("", answer).replace("\\$", "").replace("\\%", "%").strip("$ ")
    if text.endswith("%"):
        share = rational(text[:-1])
        return None if share is None else share / 100
    if PLAIN.fullmatch(text) and any(map(str.isdigit, text)):
        return Fraction(text.replace(",", ""))
    if found := EXPONENT.fullmatch(text):
        return Fraction(found[1]) * Fraction(10) ** int(found[2])
    if found := REPEATING.fullmatch(text):
        plain, digits = found.groups()
        places = len(plain.partition(".")[2])
        rest = Fraction(int(digits), 10**places * (10 ** len(digits) - 1))
        return Fraction(plain + "0") + (-rest if plain.startswith("-") else rest)
    if found := FRACTION.fullmatch(text):
        return _quotient(*(part for part in found.groups() if part is not None))
    if found := MIXED.fullmatch(text):
        sign, whole, *parts = (part for part in found.groups() if part is not None)
        rest = _quotient("", *parts)
        return rest if rest is None else (int(whole) + rest) * (-1 if sign else 1)
    return None


def _quotient(sign: str, top: str, bottom: str) -> Fraction | None:
    return Fraction(int(sign + "1") * int(top), int(bottom)) if int(bottom) else None


def tidy(answer: str) -> str:
    """An answer as math-verify reads it right: powers of Python and single letters in another face written plainly."""
    if re.search(r"\*\*[^-+*/,()]*\*\*", answer):
        raise Unreadable("powers of powers")
    return NAMES.sub(r"\1", THOUSANDS.sub("", answer).replace("**", "^")).strip().rstrip(".")


def read(answer: str) -> Any:
    """The sympy object that math-verify reads. Raises Unreadable where it leaves out a part of the text."""
    from math_verify import parse

    # without a time limit of its own: the parent keeps the time, and can also stop what no signal interrupts
    found = parse(f"${answer}$", parsing_timeout=None)
    if len(found) != 2 or normal_form(found[1]) != normal_form(answer):
        raise Unreadable(answer)
    return found[0]


def judge(answer: str, gold: str) -> str:
    """``equal``, ``differs``, or ``undecided`` where math-verify says equal and the second check cannot confirm it."""
    from math_verify import verify

    numbers = rational(answer), rational(gold)
    if None not in numbers:
        return "equal" if numbers[0] == numbers[1] else "differs"
    try:
        answer, gold = tidy(answer), tidy(gold)
        if any(kind.fullmatch(text) for kind in (TIME, BASE) for text in (answer, gold)):
            return "equal" if re.sub("[{}]", "", answer) == re.sub("[{}]", "", gold) else "differs"
        one, other = read(answer), read(gold)
        if not any(verify(*pair, timeout_seconds=None) for pair in ([other, one], [one, other])):
            return "differs"
        return "equal" if same(one, other) else "differs"
    except (Unreadable, ArithmeticError, ValueError, TypeError, AttributeError):
        return "undecided"


def same(one: Any, other: Any) -> bool:
    """Whether two objects of sympy are equal, part by part. Raises Unreadable for a kind that is not known here."""
    import sympy

    one, other = (_plain(each) for each in (one, other))
    if isinstance(one, sympy.Eq) != isinstance(other, sympy.Eq):  # x = 5 for 5
        equation, value = (one, other) if isinstance(one, sympy.Eq) else (other, one)
        return equation.lhs.is_Symbol and same(equation.rhs, value)
    if isinstance(one, sympy.Eq):
        ratio = (one.lhs - one.rhs) / (other.lhs - other.rhs)
        found = [_value(ratio, seed) for seed in range(3)]
        return found[0] != 0 and all(_close(a, b) for a, b in pairwise(found))
    kinds = (sympy.Interval, sympy.FiniteSet, sympy.Union, sympy.Tuple, sympy.MatrixBase)
    if isinstance(one, kinds) or isinstance(other, kinds):
        return _same_parts(one, other)
    if isinstance(one, sympy.Set) or not isinstance(one, sympy.Expr) or not isinstance(other, sympy.Expr):
        return one == other
    if one.is_infinite or other.is_infinite:
        return one == other
    return all(_close(_value(one, seed), _value(other, seed)) for seed in range(3))


def _plain(each: Any) -> Any:
    """A relation such as x < 3 as its interval; decimals as the fractions they stand for."""
    import sympy

    if isinstance(each, set | frozenset):
        return sympy.FiniteSet(*each)
    if isinstance(each, tuple | list):
        return sympy.Tuple(*each)
    if isinstance(each, sympy.Rel | sympy.And) and not isinstance(each, sympy.Eq) and len(each.free_symbols) == 1:
        each = each.as_set()
    return each.replace(lambda x: getattr(x, "is_Float", False), lambda x: sympy.Rational(str(x)))


def _same_parts(one: Any, other: Any) -> bool:
    import sympy

    if isinstance(one, sympy.Interval) and isinstance(other, sympy.Interval):
        open_ends = one.left_open == other.left_open and one.right_open == other.right_open
        return bool(open_ends) and same(one.start, other.start) and same(one.end, other.end)
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return one.shape == other.shape and all(same(a, b) for a, b in zip(one, other, strict=True))
    for kind in (sympy.FiniteSet, sympy.Union, sympy.Tuple):
        if isinstance(one, kind) and isinstance(other, kind) and len(one.args) == len(other.args):
            if kind is sympy.Tuple:
                return all(same(a, b) for a, b in zip(one.args, other.args, strict=True))
            left = list(other.args)
            for part in one.args:  # equality is transitive, so each takes the first partner it finds
                partner = next((candidate for candidate in left if same(part, candidate)), None)
                if partner is None:
                    return False
                left.remove(partner)
            return True
    return False


def _value(expression: Any, seed: int) -> Any:
    """An expression to many digits, its variables at a random point: one of positive, negative and mixed numbers."""
    import sympy

    values = {}
    for symbol in expression.free_symbols:
        rng = random.Random(f"{symbol} {seed}")
        sign = (1, -1, rng.choice((1, -1)))[seed]
        values[symbol] = sympy.Rational(sign * rng.randint(10**6, 3 * 10**6), rng.randint(10**6, 2 * 10**6))
    found = sympy.N(expression.subs(values), DIGITS + 20, maxn=2000)
    if not found.is_number:
        raise Unreadable(str(expression))
    return found


def _close(a: Any, b: Any) -> bool:
    import sympy

    gap = sympy.N(abs(a - b), 10)
    return bool(gap <= sympy.Float(10) ** -DIGITS * max(abs(a), abs(b)))


def serve(memory_mib: int) -> None:
    """The grader's process: a JSON line [answer, gold] in, a JSON verdict out."""
    import resource

    import math_verify  # noqa: F401 - before the limit, and to fail at once where it is missing

    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            verdict = judge(*json.loads(line))
        except (Exception, RecursionError):
            verdict = "error"
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
