"""Pairs of answers that are equal or nearly so: every kind of near miss that a grader of final answers meets."""

import pytest

from rlhfscale.evals.verifiers import MathGrader

EQUAL = [
    ("1e3", "1000"),
    ("1.5e-3", "0.0015"),
    (r"1.5 \times 10^{3}", "1500"),
    ("2**10", "1024"),
    ("2^10", "1024"),
    ("5!", "120"),
    (r"\frac{6!}{5!}", "6"),
    (r"\binom{5}{2}", "10"),
    ("007", "7"),
    ("0.50", r"\frac{1}{2}"),
    (".125", r"\frac18"),
    ("1,000,000", "1000000"),
    (r"10{,}000", "10000"),
    (r"10\,000", "10000"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    ("2 1/2", "5/2"),
    (r"-1\frac13", r"-\frac{4}{3}"),
    (r"0.\overline{3}", r"\frac{1}{3}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    ("--5", "5"),
    (r"50\%", "0.5"),
    (r"50\%", r"\frac{1}{2}"),
    (r"50\%", "50"),
    (r"\$5.50", "5.5"),
    (r"5\text{ cm}", "5"),
    (r"12 \text{ inches}", r"12\text{ inch}"),
    (r"3 \mathrm{cm}^2", "3"),
    (r"90^\circ", "90"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt[3]{27}", "3"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"2^{1/2}", r"\sqrt{2}"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"x(y+1)", "xy + x"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1-e^{-1}"),
    (r"\pi/2", r"\frac{\pi}{2}"),
    ("(1, 2)", r"\left(1,2\right)"),
    (r"(\frac12, 0.5)", r"(0.5, \frac{1}{2})"),
    (r"\{3,1,2\}", r"\{1,2,3\}"),
    ("1, 2", r"2, 1"),
    (r"2\pm\sqrt{3}", r"2-\sqrt{3}, 2+\sqrt{3}"),
    (r"(-\infty, 3)", "x<3"),
    (r"[1,2)\cup(3,4]", r"(3,4]\cup[1,2)"),
    ("y = 2x+3", "2x + 3 = y"),
    (r"x = \frac{3}{6}", "0.5"),
    ("6:8", "3:4"),
    (r"\begin{pmatrix} 1 & 0.5 \\ 0 & 1 \end{pmatrix}", r"\begin{pmatrix} 1 & \frac12 \\ 0 & 1 \end{pmatrix}"),
    (r"\text{(A)}", "A"),
    (r"3\sqrt 2", r"\sqrt{18}"),
    ("101_2", "101_{2}"),
    ("3:45", "3:45"),
    (r"x \in [1,2]", "[1,2]"),
    (r"0.1\overline{6}", r"\frac16"),
    ("-0.5", r"-\frac{1}{2}"),
    ("12.5%", r"\frac{1}{8}"),
]
DIFFERENT = [
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("5!", "6!"),
    ("5!!", "120"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("10^{-10}", "10^{-11}"),
    ("0.0000001", "0"),
    (r"1 + 10^{-20}", "1"),
    ("1e-3", "1e-4"),
    ("1e3", "e^3"),
    ("9**9**9", "9"),
    ("2**3**2", "64"),
    ("10^{100}+1", "10^{100}"),
    ("-5", "5"),
    ("2-3", "3-2"),
    (r"-\frac12", r"\frac{1}{2}"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    (r"2+\sqrt{3}", r"2-\sqrt{3}"),
    (r"2\pm\sqrt{3}", r"2+\sqrt{3}"),
    ("0.333", r"\frac13"),
    ("0.333333333333", r"\frac13"),
    ("3.14159265358979", r"\pi"),
    ("1.41421356237", r"\sqrt{2}"),
    (r"\frac{2}{3}", r"\frac{3}{2}"),
    ("2 1/2", "21/2"),
    (r"2\frac{1}{2}", "1"),
    ("1.05", "1.5"),
    ("0.05", "0.5"),
    ("1,00", "100"),
    ("12", "1,2"),
    (r"50\%", r"5\%"),
    (r"50\%", "0.05"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ cm}", r"5\text{ cm}^2"),
    (r"12\text{ inches}", r"12\text{ feet}"),
    (r"3\!:\!45\text{ a.m.}", r"3\!:\!45\text{ p.m.}"),
    ("3:45", "3:46"),
    ("6:08", "3:04"),
    ("3:4", "4:3"),
    ("3:4", r"\frac{4}{3}"),
    ("(1,2)", "[1,2]"),
    ("(1,2]", "[1,2)"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", r"\{1,2\}"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1", r"\{1\}"),
    (r"(-\infty,3)", r"(-\infty,3]"),
    (r"(-\infty,3)", "(0,3)"),
    ("x<3", r"x \le 3"),
    ("x<3", "x>3"),
    ("1 < x < 2", r"1 < x \le 2"),
    (r"|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    ("x^2", "x^3"),
    ("x+1", "x+2"),
    ("xy", "x+y"),
    ("2x", "x^2"),
    ("y = 2x+3", "y = 2x-3"),
    ("y = 2x", "y = 3x"),
    (r"\log_2 8", r"\log_8 2"),
    (r"\sin x", r"\cos x"),
    ("101_2", "101_3"),
    ("101_2", "101"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (r"\text{cat}", r"\text{act}"),
    ("A", "B"),
    (r"10\,000", "0"),
    (r"0.1\overline{6}", r"\frac17"),
    ("5 cm", "5 m"),
    ("1/0", "0"),
    ("x + y + z", "x + y"),
    (r"x \in [1,2]", "[1,3]"),
    (r"\frac{\sqrt{2}}{10^{9}}", r"\frac{\sqrt{2}}{10^{8}}"),
    (r"\sqrt{2} + 10^{-12}", r"\sqrt{2}"),
]


@pytest.fixture(scope="module")
def grader():
    pytest.importorskip("math_verify")
    with MathGrader(timeout_s=60) as found:
        yield found


def test_there_are_fifty_of_each():
    assert len(EQUAL) >= 50 and len(DIFFERENT) >= 50


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_answers_are_right(grader, answer, gold):
    for one, other in ((answer, gold), (gold, answer)):
        assert grader.grade(rf"so \boxed{{{one}}}", other).correct


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_near_misses_are_wrong_with_a_reason(grader, answer, gold):
    for one, other in ((answer, gold), (gold, answer)):
        grade = grader.grade(rf"so \boxed{{{one}}}", other)
        assert not grade.correct and grade.reason in ("differs", "undecided")
