"""What the specs of trained policies share, on the laptop bed and on published models. Nothing here imports torch."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlhfscale.runs.spec import Spec

Algorithm = Literal["ppo", "grpo", "rloo"]


class PolicySpec(Spec):
    """A policy that is trained by reinforcement learning: the settings that every algorithm has, and PPO's critic.

    Class attributes:
        ppo_only: fields that belong to a critic. PPO needs each of them; GRPO and RLOO have none of them.
    """

    ppo_only: ClassVar[tuple[str, ...]]

    algorithm: Algorithm
    num_updates: int = Field(ge=1)
    prompts_per_update: int = Field(ge=1)
    responses_per_prompt: int = Field(ge=1)
    epochs: int = Field(ge=1)
    policy_lr: float = Field(gt=0)
    critic_lr: float | None = Field(None, gt=0)
    value_coefficient: float | None = Field(None, gt=0)
    kl_coefficient: float = Field(ge=0)
    missing_eos_penalty: float = Field(ge=0)
    lora_rank: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    seed: int = Field(ge=0)

    @property
    def rollouts(self) -> int:
        """Roll-outs of an update."""
        return self.prompts_per_update * self.responses_per_prompt

    @model_validator(mode="after")
    def _fields_of_the_algorithm(self) -> Self:
        given = [name for name in self.ppo_only if getattr(self, name) is not None]
        if self.algorithm == "ppo" and len(given) < len(self.ppo_only):
            raise ValueError(f"ppo needs {', '.join(name for name in self.ppo_only if name not in given)}")
        if self.algorithm != "ppo" and given:
            raise ValueError(f"{self.algorithm} has no critic and no use for {', '.join(given)}")
        if self.algorithm != "ppo" and self.responses_per_prompt < 2:
            raise ValueError(f"responses_per_prompt: {self.algorithm} compares at least 2 responses to a prompt")
        return self
