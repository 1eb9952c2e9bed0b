"""Specs of the study on a pretrained language model: what each stage makes, from which parents.

    Chat -> Answers -> Tuned -> Answers -> AnswerReward -> Aligned -> Answers (of any model) -> AnswerScores

Nothing here imports torch.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhfscale.checkpoints import CHECKPOINTS, checkpoint
from rlhfscale.spec import Spec
from rlhfscale.tasks.reasoning import TASKS

Precision = Literal["bf16", "nf4"]
Positive = Annotated[int, Field(ge=1)]
RATE = 1.5e11
"""Rough FLOP/s of one CPU thread in bfloat16, for plans only."""
PROMPT_TOKENS, RESPONSE_TOKENS = 46, 3
"""Rough lengths of a conversation and of a tuned model's answer, for plans only."""


def _seconds(checkpoint_name: str, tokens: float) -> float:
    return 2.0 * CHECKPOINTS[checkpoint_name].num_params * tokens / RATE


class Chat(Spec):
    """A published chat model in bfloat16. Raises ValueError for a checkpoint that is not in `checkpoints`."""

    stage: ClassVar[str] = "chat"
    runner: ClassVar[str] = "rlhfscale.language_stages:chat"

    checkpoint: str

    @model_validator(mode="after")
    def _known(self) -> "Chat":
        checkpoint(self.checkpoint)
        return self

    @property
    def cost_s(self) -> float:
        return 8.0

    @property
    def title(self) -> str:
        return self.checkpoint


class Answers(Spec):
    """A model's graded responses to questions of each task. With temperature 0: greedy."""

    stage: ClassVar[str] = "answers"
    runner: ClassVar[str] = "rlhfscale.language_stages:answers"

    model: "Chat | Tuned | Aligned"
    split: Literal["train", "eval"]
    tasks: tuple[str, ...]
    num_prompts: Positive
    num_samples: Positive
    max_new_tokens: Positive
    temperature: float = Field(ge=0)
    prompt_seed: int = Field(ge=0)
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> "Answers":
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"tasks: {unknown} are not among {', '.join(TASKS)}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("temperature: 0 (greedy) with num_samples > 1 would give equal samples")
        return self

    @property
    def also_read(self) -> tuple[Spec, ...]:
        return (self.model.base,) if isinstance(self.model, Aligned) else ()

    @property
    def cost_s(self) -> float:
        questions = len(self.tasks) * self.num_prompts
        tokens = questions * (PROMPT_TOKENS + self.num_samples * 0.6 * self.max_new_tokens)
        return 4 + 2 * _seconds(self.model.checkpoint, tokens)

    @property
    def title(self) -> str:
        return (
            f"answers of {self.model.title}, {self.split} {len(self.tasks)} x {self.num_prompts} x {self.num_samples}"
        )


class Tuned(Spec):
    """A chat model fine-tuned to give its own right answers (rejection sampling) without the words around them."""

    stage: ClassVar[str] = "tuned"
    runner: ClassVar[str] = "rlhfscale.language_stages:tuned"

    base: Chat
    data: Answers
    epochs: Positive
    batch_size: Positive
    lr: float = Field(gt=0)
    lora_rank: Positive
    seed: int = Field(ge=0)

    @property
    def checkpoint(self) -> str:
        return self.base.checkpoint

    @property
    def cost_s(self) -> float:
        accepted = 0.4 * len(self.data.tasks) * self.data.num_prompts
        return 10 + 4 * _seconds(self.checkpoint, self.epochs * accepted * (PROMPT_TOKENS + RESPONSE_TOKENS))

    @property
    def title(self) -> str:
        return f"{self.checkpoint} tuned, seed {self.seed}"


class AnswerReward(Spec):
    """An outcome reward model on the tuned model's own trunk, from comparisons of its right and wrong answers."""

    stage: ClassVar[str] = "answer_reward"
    runner: ClassVar[str] = "rlhfscale.language_stages:answer_reward"

    base: Tuned
    data: Answers
    held_out: Answers
    epochs: Positive
    prompts_per_batch: Positive
    lr: float = Field(gt=0)
    lora_rank: Positive
    seed: int = Field(ge=0)

    @property
    def cost_s(self) -> float:
        tokens = sum(
            times * len(part.tasks) * part.num_prompts * (PROMPT_TOKENS + part.num_samples * RESPONSE_TOKENS)
            for times, part in ((3 * self.epochs, self.data), (1, self.held_out))
        )
        return 15 + _seconds(self.base.checkpoint, tokens)

    @property
    def title(self) -> str:
        return f"reward model on {self.base.title}"


class Aligned(Spec):
    """The tuned model after PPO; policy, value head, reference and reward model on one base.

    The reward is ``score_weight`` times the normalised score plus ``verifier_weight`` for a right answer, less
    ``missing_eos_penalty``.
    """

    stage: ClassVar[str] = "aligned"
    runner: ClassVar[str] = "rlhfscale.language_stages:aligned"

    base: Tuned
    reward_model: AnswerReward
    score_weight: float = Field(ge=0)
    verifier_weight: float = Field(ge=0)
    precision: Precision
    tasks: tuple[str, ...]
    num_updates: Positive
    prompts_per_update: Positive
    responses_per_prompt: Positive
    epochs: Positive
    max_new_tokens: Positive
    policy_lr: float = Field(gt=0)
    critic_lr: float = Field(gt=0)
    value_coefficient: float = Field(gt=0)
    kl_coefficient: float = Field(ge=0)
    missing_eos_penalty: float = Field(ge=0)
    lora_rank: Positive
    lora_alpha: float = Field(gt=0)
    seed: int = Field(ge=0)

    @property
    def checkpoint(self) -> str:
        return self.base.checkpoint

    @property
    def cost_s(self) -> float:
        tokens = self.prompts_per_update * (PROMPT_TOKENS + self.responses_per_prompt * RESPONSE_TOKENS)
        passes = 4 + 3 * self.epochs + (2 if self.precision == "nf4" else 0)
        return 10 + self.num_updates * _seconds(self.checkpoint, passes * tokens)

    @property
    def title(self) -> str:
        by = " and ".join(
            name for name, weight in (("score", self.score_weight), ("verifier", self.verifier_weight)) if weight
        )
        return f"PPO by {by} in {self.precision} from {self.base.title}"


class AnswerScores(Spec):
    """The reward model's scores of the tuned model's answers, for best-of-N."""

    stage: ClassVar[str] = "answer_scores"
    runner: ClassVar[str] = "rlhfscale.language_stages:answer_scores"

    answers: Answers
    reward_model: AnswerReward

    @property
    def also_read(self) -> tuple[Spec, ...]:
        return (self.reward_model.base,)

    @property
    def cost_s(self) -> float:
        part = self.answers
        tokens = len(part.tasks) * part.num_prompts * (PROMPT_TOKENS + part.num_samples * RESPONSE_TOKENS)
        return 5 + _seconds(self.reward_model.base.checkpoint, tokens)

    @property
    def title(self) -> str:
        return f"scores by {self.reward_model.title}"


Answers.model_rebuild()
