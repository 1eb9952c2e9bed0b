"""Specs of the chat benchmarks: MT-Bench of two policies, and the coverage of intervals. Nothing here imports torch."""

from typing import ClassVar, Literal

from pydantic import Field

from rlhfscale.runs.spec import Spec


class MTBench(Spec):
    """Two policies' answers to MT-Bench questions, each scored by a judge, and compared in pairs (`evals.benchmarks`).

    Policies and judge are named as ``rlhfscale evaluate`` takes them; their revisions say which weights these were.
    """

    stage: ClassVar[str] = "mt_bench"
    version: ClassVar[int] = 2
    runner: ClassVar[str] = "rlhfscale.evals.stages:mt_bench"

    before: str
    before_revision: str
    before_temperature: float = Field(ge=0)
    after: str
    after_revision: str
    after_temperature: float = Field(ge=0)
    judge: str
    judge_revision: str
    constrained: bool
    questions_revision: str
    num_questions: int = Field(ge=2)
    max_new_tokens: int = Field(ge=1)
    judge_tokens: int = Field(ge=1)
    max_missing: float = Field(ge=0, le=1)
    dtype: Literal["fp32", "bf16"]
    seed: int = Field(ge=0)

    @property
    def cost_s(self) -> float:
        """Rough, for SmolLM2-135M on a CPU thread in bf16: prompts at 250 tokens/s, a batch of answers at 100."""
        num_answers = 4 * self.num_questions
        judged = 2 * num_answers * (0 if self.constrained else self.judge_tokens)
        return 30 + num_answers * (self.max_new_tokens / 100 + 2 * 400 / 250) + judged / 100

    @property
    def title(self) -> str:
        return f"MT-Bench of {self.after} against {self.before}"


class Coverage(Spec):
    """How often the length-controlled win rate's 95% intervals hold a planted win rate (`evals.planted.coverage`)."""

    stage: ClassVar[str] = "coverage"
    runner: ClassVar[str] = "rlhfscale.evals.stages:coverage"

    win_rate: float = Field(gt=0, lt=100)
    extra_chars: int
    num_instructions: int = Field(ge=20)
    num_simulations: int = Field(ge=2)
    num_refits: int = Field(ge=10)
    seed: int = Field(ge=0)

    @property
    def cost_s(self) -> float:
        return 0.5 + 2.5e-3 * self.num_simulations * self.num_refits

    @property
    def title(self) -> str:
        return f"coverage of intervals, {self.num_simulations} simulated evaluations"
