"""Parameters of the figures that sweep reward-model size, responses per prompt and algorithm, and their specs."""

from itertools import product
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from rlhfscale.bed.specs import Algorithm
from rlhfscale.runs.spec import Spec
from rlhfscale.study import roles
from rlhfscale.study.figures import StudyFigure
from rlhfscale.study.params import field

Ladder = Literal["ppo, equal prompts", "ppo, equal roll-outs", "grpo, equal prompts"]


class OnePolicy(StudyFigure):
    """One SFT rung that is trained in several ways."""

    policy_rung: str = field(role="fixed", doc="rung of the policies")

    @model_validator(mode="after")
    def _check_policy_rung(self) -> Self:
        self.settings.check_rungs("policy_rung", (self.policy_rung,))
        return self

    def before(self, seed: int) -> roles.Samples:
        """Sampled responses of the SFT model; the seed is that of the evaluation alone."""
        return self.settings.evaluation(self.settings.sft(self.policy_rung), seed)

    def evaluation(self, policy: roles.Policy) -> roles.Samples:
        """Sampled responses of a trained policy to the same prompts."""
        return self.settings.evaluation(policy, policy.seed)

    def policies(self) -> tuple[roles.Policy, ...]:
        """Every trained policy."""
        raise NotImplementedError

    def specs(self) -> tuple[Spec, ...]:
        trained = self.policies()
        found = [*trained, *map(self.evaluation, trained), *map(self.before, self.seeds)]
        return tuple(dict.fromkeys(found))

    def _splits(self, name: str, prompts: int, responses: int) -> None:
        """Raise unless the roll-outs of an update split into the recipe's number of minibatches."""
        steps = self.settings.steps_per_epoch
        if prompts < 1 or prompts * responses % steps:
            raise ValueError(f"{name}: {prompts} prompts x {responses} do not split into {steps} minibatches")


class RewardModelSize(OnePolicy):
    """C2: what a larger reward model gives to its own accuracy, to best-of-N and to PPO of one policy."""

    figure: ClassVar[str] = "02_reward_model_size"
    title: ClassVar[str] = "Larger reward models help policy training less than best-of-N"
    claims: ClassVar[tuple[str, ...]] = ("C2",)

    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    best_of: int = field(role="fixed", ge=2, doc="N of best-of-N")
    num_samples: int = field(role="fixed", ge=2, doc="responses to each held-out prompt that best-of-N draws from, M")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rungs", self.reward_model_rungs)
        if self.best_of > self.num_samples:
            raise ValueError(f"best_of: {self.best_of} must be at most num_samples = {self.num_samples}")
        return self

    def reward_model(self, rung: str, seed: int) -> roles.RewardModel:
        return self.settings.reward_model(rung, seed)

    def policy(self, rung: str, seed: int) -> roles.Policy:
        """The policy trained by PPO against a reward model of the rung."""
        return self.settings.policy(self.policy_rung, rung, seed)

    @property
    def samples(self) -> roles.Samples:
        """What best-of-N draws from, on the prompts on which PPO is evaluated."""
        return self.settings.many_samples(self.policy_rung, self.settings.eval_prompts, self.num_samples)

    def scores(self, rung: str, seed: int) -> roles.Scores:
        return self.settings.scores(self.samples, self.reward_model(rung, seed))

    def policies(self) -> tuple[roles.Policy, ...]:
        return tuple(self.policy(rung, seed) for rung, seed in product(self.reward_model_rungs, self.seeds))

    def specs(self) -> tuple[Spec, ...]:
        cells = list(product(self.reward_model_rungs, self.seeds))
        models = [self.reward_model(*cell) for cell in cells]
        return (*super().specs(), *models, self.samples, *(self.scores(*cell) for cell in cells))


class ResponsesPerPrompt(OnePolicy):
    """C5: accuracy after PPO by responses per prompt, at equal prompts and at equal roll-outs; the same for GRPO."""

    figure: ClassVar[str] = "05_responses_per_prompt"
    title: ClassVar[str] = "More responses per prompt help at first and plateau quickly"
    claims: ClassVar[tuple[str, ...]] = ("C5",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    num_prompts: int = field(role="fixed", ge=1, doc="prompts in an update, in the ladders at equal prompts")
    responses: tuple[int, ...] = field(
        role="scientific", min_length=4, doc="PPO's responses per prompt at equal prompts: 1 and doublings of it"
    )
    grpo_responses: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="GRPO's at equal prompts: 2 and doublings of it"
    )
    rollouts: int = field(role="fixed", ge=2, doc="roll-outs in an update, in the ladder at equal roll-outs")
    rollout_responses: tuple[int, ...] = field(
        role="scientific", min_length=2, doc="PPO's at equal roll-outs: 1 and doublings of it"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        for name, first in (("responses", 1), ("grpo_responses", 2), ("rollout_responses", 1)):
            sizes = getattr(self, name)
            if list(sizes) != [first * 2**power for power in range(len(sizes))]:
                raise ValueError(f"{name}: {list(sizes)} must be {first} and each doubling of it in turn")
        for size in sorted({*self.responses, *self.grpo_responses}):
            self._splits("num_prompts", self.num_prompts, size)
        for size in self.rollout_responses:
            if self.rollouts % size:
                raise ValueError(f"rollout_responses: {size} does not divide the {self.rollouts} roll-outs")
        self._splits("rollouts", self.rollouts, 1)
        return self

    def ladders(self) -> dict[Ladder, tuple[int, ...]]:
        """The responses per prompt of each ladder."""
        return {
            "ppo, equal prompts": self.responses,
            "ppo, equal roll-outs": self.rollout_responses,
            "grpo, equal prompts": self.grpo_responses,
        }

    def policy(self, name: Ladder, responses: int, seed: int) -> roles.Policy:
        algorithm, _, equal = name.partition(", equal ")
        prompts = self.num_prompts if equal == "prompts" else self.rollouts // responses
        about = {"algorithm": algorithm, "prompts": prompts, "responses": responses}
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed, **about)

    def policies(self) -> tuple[roles.Policy, ...]:
        cells = [(name, size) for name, sizes in self.ladders().items() for size in sizes]
        return tuple(dict.fromkeys(self.policy(*cell, seed) for cell in cells for seed in self.seeds))


class Algorithms(OnePolicy):
    """C9: PPO, GRPO and RLOO at equal roll-outs, by responses per prompt."""

    figure: ClassVar[str] = "09_algorithms"
    title: ClassVar[str] = "The RL algorithm matters little"
    claims: ClassVar[tuple[str, ...]] = ("C9",)

    reward_model_rung: str = field(role="fixed", doc="rung of the reward model")
    algorithms: tuple[Algorithm, ...] = field(role="scientific", min_length=2, doc="ppo and grpo, and further ones")
    rollouts: int = field(role="fixed", ge=2, doc="roll-outs in an update")
    responses: tuple[int, ...] = field(
        role="scientific", min_length=1, doc="responses per prompt, each at least 2; prompts are rollouts / responses"
    )
    equal_time_responses: int = field(role="fixed", ge=2, doc="responses per prompt where time is held equal")
    equal_time_updates: tuple[int, ...] = field(
        role="fixed", doc="updates of each of the algorithms that take as long as each other"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.settings.check_rungs("reward_model_rung", (self.reward_model_rung,))
        if len(set(self.algorithms)) < len(self.algorithms) or not {"ppo", "grpo"} <= {*self.algorithms}:
            raise ValueError(f"algorithms: {list(self.algorithms)} must hold ppo and grpo, and none twice")
        if len(set(self.responses)) < len(self.responses) or min(self.responses) < 2:
            raise ValueError(f"responses: {list(self.responses)} must be different and at least 2")
        for size in self.responses:
            if self.rollouts % size:
                raise ValueError(f"responses: {size} does not divide the {self.rollouts} roll-outs")
        self._splits("rollouts", self.rollouts, 1)
        if self.rollouts % self.equal_time_responses:
            raise ValueError(f"equal_time_responses: {self.equal_time_responses} does not divide {self.rollouts}")
        if len(self.equal_time_updates) != len(self.algorithms) or min(self.equal_time_updates) < 1:
            raise ValueError(
                f"equal_time_updates: {list(self.equal_time_updates)} is not one number for each algorithm"
            )
        return self

    def policy(self, algorithm: Algorithm, responses: int, seed: int) -> roles.Policy:
        about = {"algorithm": algorithm, "prompts": self.rollouts // responses, "responses": responses}
        return self.settings.policy(self.policy_rung, self.reward_model_rung, seed, **about)

    def in_equal_time(self, algorithm: Algorithm, seed: int) -> roles.Policy:
        """The policy that had as long as those of the other algorithms."""
        updates = self.equal_time_updates[self.algorithms.index(algorithm)]
        return self.policy(algorithm, self.equal_time_responses, seed).changed(num_updates=updates)

    def equal_rollouts(self) -> tuple[roles.Policy, ...]:
        return tuple(self.policy(*cell) for cell in product(self.algorithms, self.responses, self.seeds))

    def policies(self) -> tuple[roles.Policy, ...]:
        timed = (self.in_equal_time(*cell) for cell in product(self.algorithms, self.seeds))
        return tuple(dict.fromkeys([*self.equal_rollouts(), *timed]))


class LearningRates(StudyFigure):
    """Policies by learning rate, on seeds and prompts that no other figure uses: what the recipe's rates rest on."""

    figure: ClassVar[str] = "00_learning_rates"
    title: ClassVar[str] = "Learning rates by rung and by algorithm, chosen on seeds of their own"

    policy_rungs: tuple[str, ...] = field(role="nuisance", min_length=1, doc="rungs that PPO trains at every rate")
    reward_model_rung: str = field(role="fixed", doc="rung of the reward models")
    rates: tuple[float, ...] = field(role="nuisance", min_length=2, doc="learning rates of the policy")
    siblings: tuple[Algorithm, ...] = field(role="nuisance", doc="algorithms beside PPO")
    siblings_rung: str = field(role="fixed", doc="the rung that they train")
    siblings_responses: int = field(role="fixed", ge=2, doc="their responses per prompt, at the recipe's roll-outs")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("reward_model_rung", "siblings_rung"):
            self.settings.check_rungs(name, (getattr(self, name),))
        self.settings.check_rungs("policy_rungs", self.policy_rungs)
        if list(self.rates) != sorted(set(self.rates)) or self.rates[0] <= 0:
            raise ValueError(f"rates: {list(self.rates)} must rise, from above 0")
        if self.common_rate not in self.rates:
            raise ValueError(f"rates: {list(self.rates)} lack the recipe's {self.common_rate}")
        return self

    @property
    def common_rate(self) -> float:
        """The recipe's rate of PPO for every rung, which the others are compared with."""
        return self.settings.ppo_policy_lr

    def cells(self) -> list[tuple[Algorithm, str]]:
        """Algorithm and rung of each sweep."""
        return [*(("ppo", rung) for rung in self.policy_rungs), *((name, self.siblings_rung) for name in self.siblings)]

    def policy(self, algorithm: Algorithm, rung: str, rate: float, seed: int) -> roles.Policy:
        about = {}
        if algorithm != "ppo":
            rollouts = self.settings.ppo_prompts * self.settings.ppo_responses
            about = {"prompts": rollouts // self.siblings_responses, "responses": self.siblings_responses}
        policy = self.settings.policy(rung, self.reward_model_rung, seed, algorithm=algorithm, **about)
        return policy.changed(policy_lr=rate)

    def evaluation(self, policy: roles.Policy) -> roles.Samples:
        """Responses to the prompts on which the recipe was chosen, which no verdict is measured on."""
        return self.settings.evaluation(policy, policy.seed).changed(prompt_seed=0)

    def specs(self) -> tuple[Spec, ...]:
        cells = product(self.cells(), self.rates, self.seeds)
        policies = [self.policy(*cell, rate, seed) for cell, rate, seed in cells]
        return (*policies, *map(self.evaluation, policies))
