"""The study's specs: what each stage makes, from which parents, with which settings.

    Pretrain -> SFT -> Samples -> RewardModel -> Policy -> Samples (of the policy) -> Scores (of samples)

Nothing here imports torch: notebooks describe thousands of runs in a moment, and a plan costs nothing.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhfscale.bed import ladder, tasks
from rlhfscale.runs.policy_spec import Algorithm, PolicySpec
from rlhfscale.runs.spec import Spec

TOKENS_PER_DOCUMENT = 16
"""Mean length of a demonstration of the laptop bed, prompt included; for cost estimates."""


class Pretrain(Spec):
    """A rung trained from scratch on demonstrations of every family, next-token loss on all tokens."""

    stage: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 3
    runner: ClassVar[str] = "rlhfscale.bed.stages:pretrain"

    rung: str
    num_documents: int = Field(ge=1)
    slip: float = Field(ge=0, lt=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    seed: int = Field(ge=0)

    @field_validator("rung")
    @classmethod
    def _on_ladder(cls, name: str) -> str:
        return ladder.rung(name).name

    @property
    def cost_s(self) -> float:
        return 8 + ladder.rung(self.rung).seconds(train_tokens=self.num_documents * TOKENS_PER_DOCUMENT)

    @property
    def title(self) -> str:
        return f"pretrain {self.rung}"


class SFT(Spec):
    """A pretrained rung fine-tuned on demonstrations, loss on the responses only."""

    stage: ClassVar[str] = "sft"
    version: ClassVar[int] = 3
    runner: ClassVar[str] = "rlhfscale.bed.stages:sft"

    base: Pretrain
    families: tuple[str, ...]
    num_documents: int = Field(ge=1)
    slip: float = Field(ge=0, lt=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    seed: int = Field(ge=0)

    @property
    def rung(self) -> str:
        return self.base.rung

    @property
    def cost_s(self) -> float:
        return 2 + ladder.rung(self.rung).seconds(train_tokens=self.num_documents * TOKENS_PER_DOCUMENT)

    @property
    def title(self) -> str:
        return f"sft {self.rung}"


class _FromLabels(Spec):
    """What every reward model is made from: labelled samples, and an SFT model to start from."""

    base: SFT
    data: tuple["Samples", ...]
    held_out: tuple["Samples", ...]
    num_prompts: int = Field(ge=1)
    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    muon_lr: float = Field(gt=0)
    lora_rank: int = Field(ge=0)
    seed: int = Field(ge=0)

    useful: ClassVar[float] = 1.0
    """Share of the responses that are computed in training, for estimates of cost."""

    @model_validator(mode="after")
    def _enough_data(self) -> Self:
        most = sum(samples.num_prompts for samples in self.data)
        if self.num_prompts > most:
            raise ValueError(f"num_prompts: {self.num_prompts} is more than the {most} labelled prompts of the data")
        return self

    @property
    def rung(self) -> str:
        return self.base.rung

    @property
    def cost_s(self) -> float:
        sequences = self.useful * self.num_prompts * self.epochs * self.data[0].num_samples
        held_out = sum(samples.num_prompts * samples.num_samples for samples in self.held_out)
        return 1 + ladder.rung(self.rung).seconds(
            train_tokens=sequences * TOKENS_PER_DOCUMENT, forward_tokens=held_out * TOKENS_PER_DOCUMENT
        )


class RewardModel(_FromLabels):
    """An outcome reward model, started from an SFT model: Bradley-Terry on the pairs within each prompt, and with the
    loss ``both``, the paper's multi-task form, cross-entropy on whether each answer is right."""

    stage: ClassVar[str] = "reward_model"
    version: ClassVar[int] = 4
    runner: ClassVar[str] = "rlhfscale.bed.stages:reward_model"
    useful: ClassVar[float] = 0.5  # half of the prompts teach nothing or repeat responses, and are not computed

    prompts_per_batch: int = Field(ge=1)
    loss: Literal["pairs", "both"]
    readout: Literal["last", "sum"]

    @property
    def title(self) -> str:
        return f"reward model {self.rung}, {self.num_prompts} prompts, seed {self.seed}"


class ProcessRewardModel(_FromLabels):
    """A process reward model: right or wrong for each step of single responses, started from an SFT model."""

    stage: ClassVar[str] = "process_reward_model"
    version: ClassVar[int] = 2
    runner: ClassVar[str] = "rlhfscale.bed.stages:process_reward_model"

    responses_per_batch: int = Field(ge=1)
    aggregate: Literal["last", "min", "product"]

    @property
    def title(self) -> str:
        return f"process reward model {self.rung}, {self.num_prompts} prompts, seed {self.seed}"


class MixedRewardModel(_FromLabels):
    """An outcome reward model from a mix of comparisons, right or wrong responses, and right or wrong steps."""

    stage: ClassVar[str] = "mixed_reward_model"
    version: ClassVar[int] = 2
    runner: ClassVar[str] = "rlhfscale.bed.stages:mixed_reward_model"

    mix: tuple[float, float, float]
    prompts_per_batch: int = Field(ge=1)

    @field_validator("mix")
    @classmethod
    def _shares(cls, mix: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(mix) < 0 or abs(sum(mix) - 1) > 1e-6:
            raise ValueError(f"mix: {mix} are not shares that sum to 1")
        return mix

    @property
    def title(self) -> str:
        mix = "/".join(f"{100 * share:.0f}" for share in self.mix)
        return f"reward model {self.rung}, mix {mix}, {self.num_prompts} prompts, seed {self.seed}"


AnyRewardModel = RewardModel | ProcessRewardModel | MixedRewardModel


class Policy(PolicySpec):
    """An SFT model trained against a frozen reward model, by PPO or by one of its siblings without a critic."""

    stage: ClassVar[str] = "policy"
    version: ClassVar[int] = 3
    runner: ClassVar[str] = "rlhfscale.bed.stages:policy"

    ppo_only: ClassVar[tuple[str, ...]] = (
        "critic", "critic_lr", "value_coefficient", "value_clip", "gamma", "lam"
    )  # fmt: skip

    sft: SFT
    reward_model: AnyRewardModel
    algorithm: Algorithm
    critic: Literal["trunk", "separate"] | None = None
    minibatch_size: int = Field(ge=1)
    clip: float = Field(gt=0)
    value_clip: float | None = Field(None, gt=0)
    gamma: float | None = Field(None, gt=0, le=1)
    lam: float | None = Field(None, ge=0, le=1)
    temperature: float = Field(gt=0)
    max_grad_norm: float = Field(gt=0)

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "Policy":
        if self.rollouts % self.minibatch_size:
            raise ValueError(f"minibatch_size: {self.minibatch_size} does not divide the {self.rollouts} roll-outs")
        return self

    @property
    def rung(self) -> str:
        return self.sft.rung

    @property
    def cost_s(self) -> float:
        tokens = self.num_updates * self.prompts_per_update * self.responses_per_prompt * TOKENS_PER_DOCUMENT
        policy, reward = ladder.rung(self.rung), ladder.rung(self.reward_model.rung)
        passes = 1.5 if self.critic == "separate" else 0.75
        learning = policy.seconds(train_tokens=passes * self.epochs * tokens, forward_tokens=2 * tokens)
        return 1 + 0.09 * self.num_updates + learning + reward.seconds(forward_tokens=tokens)

    @property
    def title(self) -> str:
        rollouts = f"{self.prompts_per_update} x {self.responses_per_prompt}"
        return f"{self.algorithm} {self.rung}, {rollouts}, reward model {self.reward_model.rung}, seed {self.seed}"


class Samples(Spec):
    """Responses of a model to a split's prompts, labelled by the verifier. With temperature 0: greedy."""

    stage: ClassVar[str] = "samples"
    version: ClassVar[int] = 3
    runner: ClassVar[str] = "rlhfscale.bed.stages:samples"

    model: SFT | Policy
    split: Literal["train", "eval"]
    families: tuple[str, ...]
    num_prompts: int = Field(ge=1)
    num_samples: int = Field(ge=1)
    temperature: float = Field(ge=0)
    prompt_seed: int = Field(ge=0)
    seed: int = Field(ge=0)

    @field_validator("families")
    @classmethod
    def _known_families(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in tasks.FAMILIES:
                raise ValueError(f"families: {name!r} is not one of {', '.join(tasks.FAMILIES)}")
        return names

    @model_validator(mode="after")
    def _greedy_once(self) -> "Samples":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("temperature: 0 (greedy) with num_samples > 1 would give equal samples")
        return self

    @property
    def cost_s(self) -> float:
        tokens = self.num_prompts * self.num_samples * TOKENS_PER_DOCUMENT
        return 0.4 + ladder.rung(self.model.rung).seconds(forward_tokens=1.5 * tokens)

    @property
    def title(self) -> str:
        return f"sample {self.model.title}, {self.num_prompts} x {self.num_samples}"


class Scores(Spec):
    """A reward model's scores of sampled responses."""

    stage: ClassVar[str] = "scores"
    version: ClassVar[int] = 2
    runner: ClassVar[str] = "rlhfscale.bed.stages:scores"

    samples: Samples
    reward_model: AnyRewardModel

    @property
    def cost_s(self) -> float:
        tokens = self.samples.num_prompts * self.samples.num_samples * TOKENS_PER_DOCUMENT
        distinct = 0.2 * tokens
        return 1 + ladder.rung(self.reward_model.rung).seconds(forward_tokens=distinct)

    @property
    def title(self) -> str:
        return f"score by {self.reward_model.title}"


RewardModel.model_rebuild()
ProcessRewardModel.model_rebuild()
MixedRewardModel.model_rebuild()
