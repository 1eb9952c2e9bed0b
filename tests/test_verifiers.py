"""Graders: rules by hand, algebra by math-verify, answers that try to hang or to run code."""

import itertools
import time

import numpy as np
import pytest

from rlhfscale.evals import verifiers
from rlhfscale.evals.verifiers import Grade, MathGrader


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("9 * 2 = 18\nA: 18", "18"),
        ("#### 1,234.", "1234"),
        ("A: 5\nwait\nA: -3.50", "-3.50"),
        ("the A: 7 is inside a line", None),
        ("####\n12", "12"),
        ("", None),
        ("####" + "9" * 500_000, "9" * 500_000),
    ],
)
def test_gsm8k_answers(solution, answer):
    assert verifiers.gsm8k_answer(solution) == answer


def test_gsm8k_is_compared_as_text():
    assert verifiers.gsm8k_correct("A: 70,000", "#### 70000")
    assert not verifiers.gsm8k_correct("A: 70000.0", "#### 70000")
    assert not verifiers.gsm8k_correct("no answer", "#### 7")
    with pytest.raises(ValueError, match="gold"):
        verifiers.gsm8k_correct("A: 7", "seven")


def test_numbers_with_a_tolerance_and_percent():
    assert verifiers.number_correct("18.0004", "18") and not verifiers.number_correct("18.01", "18")
    assert verifiers.number_correct("0.25", "25") and not verifiers.number_correct("0.25", "25", percent=False)
    assert verifiers.number_correct("$2,125", "2125") and verifiers.number_correct("2500", "25")
    assert verifiers.number_correct("red", "red") and not verifiers.number_correct("red", "7")
    for text in ("1e9", "nan", "inf", "0x10", "__import__('os')", "9" * 1000, ""):
        assert verifiers.number(text) is None


@pytest.mark.parametrize(
    ("solution", "boxed"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\fbox{x}", "x"),
        (r"so it is \boxed 5", "5"),
        (r"$\boxed 5$ is it", "5"),
        ("\\boxed \\frac12.\nThat is all", r"\frac12"),
        (r"\boxed 5 or rather \boxed {6}", "6"),
        (r"\boxed", None),
        (r"\boxed{1", None),
        ("1", None),
    ],
)
def test_the_last_box(solution, boxed):
    assert verifiers.last_boxed(solution) == boxed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        ("0.5", "1/2"),
        (r"90^\circ", "90"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"x = 5", "5"),
        (r"5 \text{ cm}", "5"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"50\%", "50"),
        (".5", r"\frac{1}{2}"),
    ],
)
def test_normal_forms(one, other):
    assert verifiers.normal_form(one) == verifiers.normal_form(other)


def test_normal_form_is_quick_on_anything():
    start = time.perf_counter()
    for text in (r"\frac" * 400, r"\frac{" + "1" * 2000, "\\sqrt" * 400, "{" * 2000, " ." * 1000):
        verifiers.normal_form(text)
    assert time.perf_counter() - start < 1


def test_algebra_by_math_verify():
    pytest.importorskip("math_verify")
    with MathGrader(timeout_s=20) as grader:
        right = [(r"\boxed{x+1}", "1+x"), (r"\boxed{\{1,2\}}", r"\{2,1\}"), (r"\boxed{2\sqrt{2}}", r"\sqrt{8}")]
        assert [grader.grade(*pair) for pair in right] == [Grade(True)] * 3
        wrong = [(r"\boxed{x-1}", "1+x"), (r"\boxed{3}", "4")]
        assert [grader.grade(*pair) for pair in wrong] == [Grade(False, "differs")] * 2
        assert grader.grade("3", "3") == Grade(False, "no answer")
        assert grader.grade(r"\boxed{" + "1" * 3000 + "}", "3") == Grade(False, "too long")


def test_an_answer_that_never_ends_is_stopped_and_the_next_is_graded(tmp_path):
    pytest.importorskip("math_verify")
    with MathGrader(timeout_s=20) as grader:
        assert grader.grade(r"\boxed{x+1}", "1+x").correct  # started
        grader.timeout_s = 1.5
        start = time.monotonic()
        hanging = grader.grade(r"\boxed{9^{9^{9^{9}}}}", "4")
        assert not hanging.correct and hanging.reason in ("timeout", "error", "differs")
        assert time.monotonic() - start < 10
        grader.timeout_s = 20
        bait = tmp_path / "bait"
        attack = rf"\boxed{{__import__('pathlib').Path('{bait}').touch()}}"
        assert not grader.grade(attack, "4").correct and not bait.exists()
        assert grader.grade(r"\boxed{2+2}", "4").correct


def test_majority():
    assert verifiers.majority(["1", r"\frac12", "0.5", None]) == r"\frac12"
    assert verifiers.majority(["2", "1"]) == "2"
    assert verifiers.majority([None, None]) is None


def test_pass_at_k_is_the_mean_over_all_subsets():
    correct = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]])
    rates = verifiers.accuracies(correct, [True, False, False], sizes=[1, 2, 3, 5])
    for k in (1, 2, 3, 5):
        subsets = list(itertools.combinations(range(5), k))
        truth = np.mean([[row[list(s)].any() for s in subsets] for row in correct])
        assert rates[f"pass@{k}"] == pytest.approx(truth)
    assert rates["accuracy"] == pytest.approx(0.2) and rates["majority@5"] == pytest.approx(1 / 3)
