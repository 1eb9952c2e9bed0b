"""Specs of the study on published language models: what each stage makes, from which parents.

    Chat -> Answers -> Tuned -> Answers -> AnswerReward -> Aligned -> Answers (of any model) -> AnswerScores

The models of a node need not be of one checkpoint: a reward model learns from other models' answers, and scores those
of a policy of another size. Nothing here imports torch.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhfscale.chat.reasoning import TASKS
from rlhfscale.models.checkpoints import CHECKPOINTS, checkpoint
from rlhfscale.planning.placement import placed
from rlhfscale.runs.policy_spec import Algorithm, PolicySpec
from rlhfscale.runs.spec import Needs, Spec

Precision = Literal["bf16", "nf4"]
Positive = Annotated[int, Field(ge=1)]
RATE, GPU_RATE = 1.5e11, 1.0e14
"""Rough FLOP/s of one CPU thread in bfloat16, and of one GPU, for plans only."""
PROMPT_TOKENS, RESPONSE_TOKENS = 46, 3
"""Rough lengths of a conversation and of a tuned model's answer, for plans only."""
LARGE, LARGE_TOKENS = 2e8, 4096
"""Models of so many parameters keep only the inputs of their blocks in training and are trained on so many tokens at a
time: memory for time, and the same gradients."""


class Chat(Spec):
    """A published chat model in bfloat16. Raises ValueError for a checkpoint that is not in `checkpoints`.

    Its precision is that in which all that is made of it loads it, on GPUs where there are some. None stands for a
    CPU: bfloat16, and for fine-tuning float32 that is computed in bfloat16.
    """

    stage: ClassVar[str] = "chat"
    runner: ClassVar[str] = "rlhfscale.chat.stages:chat"
    added: ClassVar[tuple[str, ...]] = ("precision",)

    checkpoint: str
    precision: Precision | None = None

    @model_validator(mode="after")
    def _known(self) -> "Chat":
        checkpoint(self.checkpoint)
        return self

    @property
    def chat(self) -> "Chat":
        return self

    @property
    def saved(self) -> Spec:
        """The spec whose folder holds weights and tokenizer."""
        return self

    @property
    def num_params(self) -> float:
        return CHECKPOINTS[self.checkpoint].num_params

    def seconds(self, tokens: float) -> float:
        """Rough seconds of reading so many tokens."""
        return 2.0 * self.num_params * tokens / (RATE if self.precision is None else GPU_RATE)

    @property
    def cost_s(self) -> float:
        return 8.0

    @property
    def needs(self) -> Needs:
        return _needs(self, self)

    @property
    def title(self) -> str:
        return self.checkpoint


def _needs(spec: Spec, *chats: Chat) -> Needs:
    """What a stage that holds these models takes: the GPUs that the planner finds, and the machine's memory, roughly.

    Weights go through the machine's memory one model at a time, in bfloat16. Raises pool.PoolError where no number of
    GPUs holds it.
    """
    if chats[0].precision is None:
        return Needs(memory_mib=2048 + int(8 * sum(chat.num_params for chat in chats) / 2**20))
    gpus, machines = placed(spec)
    largest = max(chat.num_params for chat in chats)
    return Needs(gpus=gpus, machines=machines, memory_mib=8192 + int(2.2 * largest / 2**20))


class Answers(Spec):
    """A model's graded responses to ``num_prompts`` questions of each task. With temperature 0: greedy."""

    stage: ClassVar[str] = "answers"
    runner: ClassVar[str] = "rlhfscale.chat.stages:answers"

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
        return (self.model.saved,)

    @property
    def cost_s(self) -> float:
        questions = len(self.tasks) * self.num_prompts
        tokens = questions * (PROMPT_TOKENS + self.num_samples * 0.6 * self.max_new_tokens)
        return 4 + 2 * self.model.chat.seconds(tokens)

    @property
    def needs(self) -> Needs:
        return _needs(self, self.model.chat)

    @property
    def title(self) -> str:
        return (
            f"answers of {self.model.title}, {self.split} {len(self.tasks)} x {self.num_prompts} x {self.num_samples}"
        )


class Tuned(Spec):
    """A chat model fine-tuned to give its own right answers (rejection sampling) without the words around them."""

    stage: ClassVar[str] = "tuned"
    runner: ClassVar[str] = "rlhfscale.chat.stages:tuned"

    base: Chat
    data: Answers
    epochs: Positive
    batch_size: Positive
    lr: float = Field(gt=0)
    lora_rank: Positive
    seed: int = Field(ge=0)

    @property
    def chat(self) -> Chat:
        return self.base

    @property
    def saved(self) -> Spec:
        """The spec whose folder holds weights and tokenizer."""
        return self

    @property
    def checkpoint(self) -> str:
        return self.base.checkpoint

    @property
    def cost_s(self) -> float:
        accepted = 0.4 * len(self.data.tasks) * self.data.num_prompts
        return 10 + 4 * self.chat.seconds(self.epochs * accepted * (PROMPT_TOKENS + RESPONSE_TOKENS))

    @property
    def needs(self) -> Needs:
        return _needs(self, self.chat)

    @property
    def title(self) -> str:
        return f"{self.checkpoint} tuned, seed {self.seed}"


class AnswerReward(Spec):
    """An outcome reward model, adapters on a tuned model's trunk, from comparisons of right and wrong answers.

    The answers of ``data`` may be of other checkpoints: then their text is read. Of each of them the first
    ``num_prompts`` questions of every task are learnt from, or all.
    """

    stage: ClassVar[str] = "answer_reward"
    runner: ClassVar[str] = "rlhfscale.chat.stages:answer_reward"
    added: ClassVar[tuple[str, ...]] = ("num_prompts",)

    base: Tuned
    data: tuple[Answers, ...] = Field(min_length=1)
    held_out: tuple[Answers, ...] = Field(min_length=1)
    epochs: Positive
    prompts_per_batch: Positive
    lr: float = Field(gt=0)
    lora_rank: Positive
    seed: int = Field(ge=0)
    num_prompts: Positive | None = None

    @model_validator(mode="after")
    def _enough_data(self) -> "AnswerReward":
        least = min(part.num_prompts for part in self.data)
        if (self.num_prompts or 0) > least:
            raise ValueError(f"num_prompts: {self.num_prompts} is more than the {least} labelled questions of a task")
        return self

    def describe(self) -> dict[str, Any]:
        """One source of answers stands by itself, as before there could be several: such a model keeps its key."""
        found = super().describe()
        for name in ("data", "held_out"):
            if len(getattr(self, name)) == 1:
                (found["fields"][name],) = found["fields"][name]
        return found

    @property
    def also_read(self) -> tuple[Spec, ...]:
        return tuple(part.model.saved for part in (*self.data, *self.held_out))

    @property
    def checkpoint(self) -> str:
        return self.base.checkpoint

    @property
    def cost_s(self) -> float:
        tokens = sum(
            times * len(part.tasks) * count * (PROMPT_TOKENS + part.num_samples * RESPONSE_TOKENS)
            for times, parts, most in ((3 * self.epochs, self.data, self.num_prompts), (1, self.held_out, None))
            for part, count in ((part, most or part.num_prompts) for part in parts)
        )
        return 15 + self.base.chat.seconds(tokens)

    @property
    def needs(self) -> Needs:
        return _needs(self, self.base.chat)

    @property
    def title(self) -> str:
        return f"reward model of seed {self.seed} on {self.base.title}"


class Aligned(PolicySpec):
    """A tuned model after PPO, GRPO or RLOO; policy, value head and reference are on one base, and so is a reward model
    of the same tuned model. Another one is a second frozen model.

    The reward is ``score_weight`` times the normalised score plus ``verifier_weight`` for a right answer, less
    ``missing_eos_penalty``.
    """

    stage: ClassVar[str] = "aligned"
    runner: ClassVar[str] = "rlhfscale.chat.stages:aligned"
    added: ClassVar[tuple[str, ...]] = ("algorithm",)

    ppo_only: ClassVar[tuple[str, ...]] = ("critic_lr", "value_coefficient")

    base: Tuned
    reward_model: AnswerReward
    algorithm: Algorithm = "ppo"
    score_weight: float = Field(ge=0)
    verifier_weight: float = Field(ge=0)
    precision: Precision
    tasks: tuple[str, ...]
    max_new_tokens: Positive

    @property
    def chat(self) -> Chat:
        return self.base.chat

    @property
    def saved(self) -> Spec:
        """The spec whose folder holds weights and tokenizer; the adapters are on top."""
        return self.base

    @property
    def also_read(self) -> tuple[Spec, ...]:
        return (self.reward_model.base,)

    @property
    def checkpoint(self) -> str:
        return self.base.checkpoint

    @property
    def shares_base(self) -> bool:
        """Whether the reward model's adapter is for the policy's own base."""
        return self.reward_model.base == self.base

    @property
    def cost_s(self) -> float:
        tokens = self.num_updates * self.prompts_per_update
        tokens *= PROMPT_TOKENS + self.responses_per_prompt * RESPONSE_TOKENS
        passes = 4 + 3 * self.epochs + (2 if self.precision == "nf4" else 0)
        other = 0.0 if self.shares_base else self.reward_model.base.chat.seconds(tokens)
        return 10 + self.chat.seconds(passes * tokens) + other

    @property
    def needs(self) -> Needs:
        return _needs(self, self.chat, *([] if self.shares_base else [self.reward_model.base.chat]))

    @property
    def title(self) -> str:
        by = " and ".join(
            name for name, weight in (("score", self.score_weight), ("verifier", self.verifier_weight)) if weight
        )
        of = "" if self.shares_base else f" of {self.reward_model.checkpoint}"
        return f"{self.algorithm.upper()} of seed {self.seed} by {by}{of} in {self.precision} from {self.base.title}"


class AnswerScores(Spec):
    """A reward model's scores of answers, for best-of-N."""

    stage: ClassVar[str] = "answer_scores"
    runner: ClassVar[str] = "rlhfscale.chat.stages:answer_scores"

    answers: Answers
    reward_model: AnswerReward

    @property
    def also_read(self) -> tuple[Spec, ...]:
        return self.reward_model.base, self.answers.model.saved

    @property
    def cost_s(self) -> float:
        part = self.answers
        tokens = len(part.tasks) * part.num_prompts * (PROMPT_TOKENS + part.num_samples * RESPONSE_TOKENS)
        return 5 + self.reward_model.base.chat.seconds(tokens)

    @property
    def needs(self) -> Needs:
        return _needs(self, self.reward_model.base.chat)

    @property
    def title(self) -> str:
        return f"scores by {self.reward_model.title}"


Answers.model_rebuild()
