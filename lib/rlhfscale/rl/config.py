"""Hyper-parameters of the trainers, checked once when they are made."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """What PPO, GRPO and RLOO share.

    Attributes:
        prompts_per_update: prompts sampled in an update.
        responses_per_prompt: responses sampled to each of them.
        max_new_tokens: responses are cut there.
        temperature: of sampling, and of every log-probability.
        epochs: passes over an update's roll-outs.
        minibatch_size: roll-outs in an optimiser step; all of an update's by default. Divides their number.
        max_tokens_per_pass: tokens in a forward pass, padding included. Smaller saves memory and changes no result.
        policy_lr: AdamW's learning rate of the policy; constant after the warm-up.
        warmup_updates: updates over which learning rates rise linearly.
        weight_decay: AdamW's.
        max_grad_norm: gradients of policy and of critic are each clipped to it.
        clip: half-width of the ratio's clipping range.
        entropy_coefficient: of an entropy bonus, per token.
        max_ratio_kl: an update stops early once KL(sampling policy || policy) exceeds it, in nats of a token.
        kl_coefficient: beta, in units of score for each nat of KL(policy || reference).
        kl_target: adapt beta so that the KL of a response stays near this many nats (Ziegler et al. 2019); None: fixed.
        kl_horizon: responses over which an adaptive beta moves.
        max_sampler_gap: stop once the sampler's and the trainer's log-probabilities of a token differ by more than this
            many nats on average: the sampler serves other weights than are trained. None: only log it.
        missing_eos_penalty: subtracted from the score of a response that never ended.
        adapter: "lora", or "none" to train all weights.
        lora_rank, lora_alpha, lora_targets: of every adapter.
        gradient_checkpointing: trade a second forward pass for memory.
        compute_dtype: "bf16" computes the decoder layers of a float32 Llama in bfloat16 on a CPU; weights, adapters,
            heads and losses stay float32. "model": what the model's weights are.
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
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    clip: float = Field(0.2, gt=0)
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

    @property
    def rollouts_per_update(self) -> int:
        return self.prompts_per_update * self.responses_per_prompt

    @property
    def rollouts_per_step(self) -> int:
        return self.minibatch_size or self.rollouts_per_update

    @model_validator(mode="after")
    def _minibatches_divide(self) -> "Config":
        if self.rollouts_per_update % self.rollouts_per_step:
            raise ValueError(
                f"minibatch_size: {self.minibatch_size} does not divide the {self.rollouts_per_update} roll-outs"
            )
        return self


class PPOConfig(Config):
    """Hyper-parameters of PPO.

    Attributes:
        critic: "trunk", a value head on the policy's own trunk (one pass serves both); or "separate", with an adapter
            (or, for adapter "none", a copy) of its own.
        critic_lr: AdamW's learning rate of the value head, and of a separate critic.
        value_clip: half-width of the values' clipping range.
        value_coefficient: weight of the value loss where the trunk is shared.
        gamma, lam: discount and lambda of GAE.
        kl_estimator: of the KL penalty at each token.
        whiten_rewards: scale scores to standard deviation 1 within an update.
    """

    critic: Literal["trunk", "separate"] = "trunk"
    critic_lr: float = Field(1e-3, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coefficient: float = Field(0.1, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    whiten_rewards: bool = False


class _Grouped(Config):
    responses_per_prompt: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _groups(self) -> "_Grouped":
        if self.responses_per_prompt < 2:
            raise ValueError(
                "responses_per_prompt: 1 gives a response nothing to be compared with; take at least 2, or PPO"
            )
        return self


class GRPOConfig(_Grouped):
    """Hyper-parameters of GRPO.

    Attributes:
        scale_advantages: divide a group's advantages by its standard deviation (Shao et al. 2024), or not (Liu et al.
            2025).
        loss_weights: "token", every response token of the step counts alike; "sequence", every response does (Shao et
            al. 2024); "constant", tokens count 1 / max_new_tokens (Liu et al. 2025).
    """

    scale_advantages: bool = True
    loss_weights: Literal["token", "sequence", "constant"] = "token"


class RLOOConfig(_Grouped):
    """Hyper-parameters of RLOO; the KL penalty is part of the reward."""
