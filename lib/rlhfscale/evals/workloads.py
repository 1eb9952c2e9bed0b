"""What the stages of the chat benchmarks compute, by formula: to be read beside `evals.stages`."""

from collections.abc import Mapping

from rlhfscale.evals import specs
from rlhfscale.models.checkpoints import shape_of
from rlhfscale.planning.network import Network
from rlhfscale.planning.passes import Decode, Rows
from rlhfscale.planning.workloads import Lengths, Phase, Workload
from rlhfscale.runs.spec import Spec

ANSWER_BATCH = 64
"""Requests decoded together."""
JUDGED_TOKENS = 1000
"""Rough length of a judge's prompt."""


def mt_bench(spec: specs.MTBench, known: Mapping[Spec, Lengths]) -> Workload:
    """Two turns of two policies, each judged by itself and in pairs in both orders."""
    policy = Network(shape_of(spec.before), "fp32" if spec.dtype == "fp32" else "bf16", spec.dtype)
    judge = Network(shape_of(spec.judge.partition(":")[2]), policy.stored, spec.dtype)
    answers, judgments = 4.0 * spec.num_questions, 8.0 * spec.num_questions
    asked = Rows(answers, 100 + spec.max_new_tokens / 2, spec.max_new_tokens, longest=200 + 2 * spec.max_new_tokens)
    judged = 1 if spec.constrained else spec.judge_tokens
    shown = Rows(judgments, JUDGED_TOKENS, judged, longest=2 * JUDGED_TOKENS + judged)
    return Workload(
        (policy, judge),
        (
            Phase("roll-outs", (Decode(policy, asked, ANSWER_BATCH, adapter=False),)),
            Phase("scoring", (Decode(judge, shown, 8, adapter=False),)),
        ),
        2000.0 * (answers + judgments),
    )
