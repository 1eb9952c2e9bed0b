"""Hyper-parameters that PPO, GRPO and RLOO share; they are checked once, when a config is made."""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhfscale.models.loading import POLICY


class ConfigError(ValueError):
    """A hyper-parameter that does not exist or does not fit; one line for each names it, what was given, and what is
    allowed."""


class Config(BaseModel):
    """Hyper-parameters of every algorithm. Unknown names and values out of range raise ConfigError.

    Attributes:
        prompts_per_update: number of prompts in an update.
        responses_per_prompt: number of responses sampled to each prompt.
        max_new_tokens: a response is cut after this many tokens.
        temperature: sampling temperature; every log-probability is computed at it.
        epochs: passes over the roll-outs of an update.
        minibatch_size: roll-outs in an optimiser step. It must divide their number; by default a step takes all.
        max_tokens_per_pass: tokens in a forward pass, padding included. A smaller number saves memory only.
        policy_lr: AdamW's learning rate for the policy.
        warmup_updates: number of updates over which the learning rates rise linearly.
        lr_schedule: after the warm-up, learning rates stay "constant", or fall to 0 ("linear", or as half a "cosine",
            Loshchilov & Hutter 2017) until ``decay_updates``.
        decay_updates: number of updates, the warm-up included, at which falling rates reach 0.
        weight_decay: AdamW's weight decay.
        max_grad_norm: the gradients of the policy and of the critic are each clipped to this norm.
        clip: epsilon, the half-width of the clipping range of the probability ratio.
        clip_high: another width above 1 (clip-higher: Yu et al. 2025, DAPO, eq. 8). None: ``clip``.
        max_ratio: bound of the ratio of tokens with a negative advantage (two-sided clipping: Ye et al. 2020, eq. 8).
        sampler_correction: weights for responses that were drawn with other log-probabilities than the trainer's:
            "truncate" bounds the importance ratio (TIS: Yao et al. 2025), "mask" drops what is beyond the bound (MIS:
            Liu et al. 2025).
        sampler_correction_level: the ratio of each "token", or of the whole "sequence".
        sampler_max_ratio: the bound, at least 1.
        mask_truncated: learn nothing from responses without an end-of-sequence token (Yu et al. 2025, section 3.4).
        overlong_tokens: the last so many of ``max_new_tokens`` cost a penalty that rises linearly from 0 to
            ``overlong_penalty`` (soft overlong punishment: Yu et al. 2025, eq. 13). None: no penalty.
        overlong_penalty: what the longest responses lose, in units of the score.
        entropy_coefficient: weight of an entropy bonus, per token.
        max_ratio_kl: an update ends early when KL(sampling policy || policy) exceeds this many nats per token.
        kl_coefficient: beta, the price of one nat of KL(policy || reference), in units of the score.
        kl_target: KL of a response, in nats, that an adaptive beta aims at (Ziegler et al. 2019); None: beta is fixed.
        kl_horizon: number of responses over which an adaptive beta moves.
        max_sampler_gap: the run stops when the log-probabilities of sampler and trainer differ by more than this many
            nats per token on average, because the sampler then uses other weights. None: the gap is only logged.
        missing_eos_penalty: subtracted from the score of a response without an end-of-sequence token.
        adapter: "lora" trains adapters, "none" trains all weights.
        lora_rank, lora_alpha, lora_targets: rank, alpha and target modules of every adapter.
        gradient_checkpointing: compute each block again in the backward pass, which saves memory.
        compute_dtype: "bf16" computes the decoder layers of a float32 Llama in bfloat16 on a CPU; weights, adapters,
            heads and losses stay float32. "model" computes in the precision of the weights.
        head_dtype: "fp32" computes the output head of the trainer in float32 whatever the model's dtype (MiniMax-M1
            2025, section 3.2; ScaleRL, Khatri et al. 2025, section 3.2).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts_per_update: int = Field(64, ge=1)
    responses_per_prompt: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, gt=0)
    epochs: int = Field(2, ge=1)
    minibatch_size: int | None = Field(None, ge=1)
    max_tokens_per_pass: int = Field(16384, ge=1)
    policy_lr: float = Field(1e-4, gt=0)
    warmup_updates: int = Field(5, ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay_updates: int | None = Field(None, ge=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(None, gt=0)
    max_ratio: float | None = Field(None, gt=1)
    sampler_correction: Literal["none", "truncate", "mask"] = "none"
    sampler_correction_level: Literal["token", "sequence"] = "token"
    sampler_max_ratio: float = Field(2.0, ge=1)
    mask_truncated: bool = False
    overlong_tokens: int | None = Field(None, ge=1)
    overlong_penalty: float = Field(1.0, gt=0)
    entropy_coefficient: float = Field(0.0, ge=0)
    max_ratio_kl: float | None = Field(None, gt=0)
    kl_coefficient: float = Field(0.05, ge=0)
    kl_target: float | None = Field(None, gt=0)
    kl_horizon: int = Field(10_000, ge=1)
    max_sampler_gap: float | None = Field(None, gt=0)
    missing_eos_penalty: float = Field(0.0, ge=0)
    adapter: Literal["lora", "none"] = "lora"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float = Field(32.0, gt=0)
    lora_targets: str | tuple[str, ...] = "all-linear"
    gradient_checkpointing: bool = False
    compute_dtype: Literal["model", "bf16"] = "model"
    head_dtype: Literal["model", "fp32"] = "model"

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(map(self._explained, error.errors()))) from None

    @classmethod
    def _explained(cls, problem: dict[str, Any]) -> str:
        """One of pydantic's errors in one line."""
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            return f"{name}: {cls.__name__} has no such field" + (f"; did you mean {close[0]}?" if close else "")
        if problem["type"] == "value_error":
            return str(problem["ctx"]["error"])
        return f"{name}: {problem['input']!r} does not fit; {problem['msg'][0].lower()}{problem['msg'][1:]}"

    @property
    def rollouts_per_step(self) -> int:
        """Number of roll-outs in an optimiser step."""
        return self.minibatch_size or self.prompts_per_update * self.responses_per_prompt

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each role that is trained."""
        return {POLICY: self.policy_lr}

    @model_validator(mode="after")
    def _options_fit(self) -> "Config":
        if (self.lr_schedule == "constant") != (self.decay_updates is None):
            raise ValueError(f"decay_updates: {self.decay_updates} does not go with lr_schedule={self.lr_schedule!r}")
        if self.decay_updates is not None and self.decay_updates <= self.warmup_updates:
            raise ValueError(f"decay_updates: {self.decay_updates} must be above warmup_updates={self.warmup_updates}")
        if self.clip_high is not None and self.clip_high < self.clip:
            raise ValueError(f"clip_high: {self.clip_high} is below clip={self.clip}; it widens the range above 1")
        upper = 1 + (self.clip if self.clip_high is None else self.clip_high)
        if self.max_ratio is not None and self.max_ratio <= upper:
            raise ValueError(f"max_ratio: {self.max_ratio} must be above the clipping range, which ends at {upper:g}")
        if self.overlong_tokens is not None and self.overlong_tokens > self.max_new_tokens:
            raise ValueError(f"overlong_tokens: {self.overlong_tokens} is above max_new_tokens={self.max_new_tokens}")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "Config":
        rollouts = self.prompts_per_update * self.responses_per_prompt
        if rollouts % self.rollouts_per_step:
            raise ValueError(f"minibatch_size: {self.minibatch_size} does not divide the {rollouts} roll-outs")
        return self


class GroupedConfig(Config):
    """Hyper-parameters of an algorithm that compares the responses to a prompt with each other: at least 2.

    Attributes:
        dynamic_sampling: how often an update draws further prompts in place of those whose responses all earned the
            same, which teach nothing (Yu et al. 2025, DAPO, section 3.2). 0: they are kept.
    """

    responses_per_prompt: int = Field(4, ge=1)
    dynamic_sampling: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _groups(self) -> "GroupedConfig":
        if self.responses_per_prompt < 2:
            raise ValueError(
                "responses_per_prompt: 1 gives a response nothing to be compared with; take at least 2, or PPO"
            )
        return self
