"""Evaluation: best-of-N, benchmarks of chat models with a judge, and graders of mathematics.

best_of_n.py               best-of-N, pass@N and votes from many samples of each prompt
verifiers.py, algebra.py   graders of final answers; whether two answers are equal
alpaca_eval.py             AlpacaEval 2.0 win rates; logistic.py fits their length control
arena_hard.py              Arena-Hard scores; mt_bench.py, MT-Bench's; mt_judged.py, its requests to a judge
judge.py                   what a judge is; local_judges.py and endpoint.py, the judges there are
benchmarks.py, sources.py  a policy before a benchmark; where its questions come from
evaluate.py, command.py    ``rlhfscale evaluate``; revisions.py says which weights were evaluated
specs.py, stages.py        the study's own evaluations; planted.py, judgments whose truth is known; workloads.py
"""
