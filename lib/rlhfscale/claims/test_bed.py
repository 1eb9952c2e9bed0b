"""Is the laptop bed good enough to ask questions on?

The figure shows what the ladder's models can do before and after RLHF, what their reward models can do, and checks the
conditions that must hold before any claim is looked at. A second picture shows what RLHF changes: which rule the models
follow, for each operation.
"""

from itertools import product
from typing import ClassVar, Self

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from pydantic import model_validator
from safetensors.numpy import load_file

from rlhfscale.bed import specs
from rlhfscale.bed.demonstrations import STREAM, problem_list
from rlhfscale.bed.habits import habits
from rlhfscale.claims import c01_policy_size as c01
from rlhfscale.evals import best_of_n as bon
from rlhfscale.runs.spec import Spec
from rlhfscale.stats.bootstrap import Interval, bootstrap, nested_bootstrap, summary_row
from rlhfscale.stats.fits import fit_power_law, fit_with_intervals
from rlhfscale.study import bed_pictures, conditions
from rlhfscale.study.artifacts import Folders, mean_where_known, read_metrics, read_responses, read_scores
from rlhfscale.study.conditions import Condition
from rlhfscale.study.figure import StudyFigure
from rlhfscale.study.params import field
from rlhfscale.study.recipes import num_params
from rlhfscale.study.tables import (
    NO_INTERVAL,
    Runs,
    Tables,
    band_rows,
    mean_intervals,
    new_rng,
    per_prompt_table,
    rung_rows,
)

WINDOWS = 8
"""Equal parts of a training run, over which its metrics are averaged."""


class Params(StudyFigure):
    """The conditions that the laptop bed must meet before a claim is tested on it."""

    __test__: ClassVar[bool] = False  # not a pytest class
    figure: ClassVar[str] = "00_test_bed"
    from_scratch: ClassVar[str] = "00_test_bed measures how its rungs were pretrained"
    title: ClassVar[str] = "The laptop bed: what RLHF changes, and whether it works"

    policy_rungs: tuple[str, ...] = field(role="scientific", min_length=4, doc="rungs of the ladder; a law needs four")
    temperatures: tuple[float, ...] = field(role="scientific", doc="of SFT models, beside greedy decoding and 1")
    reward_model_rungs: tuple[str, ...] = field(role="scientific", min_length=2, doc="rungs of the reward models")
    reference_rung: str = field(role="fixed", doc="reward model that PPO is run with, and whose data are varied")
    size_prompts: int = field(role="fixed", doc="labelled prompts with which reward-model rungs are compared")
    data_prompts: tuple[int, ...] = field(role="scientific", min_length=1, doc="labelled prompts below that")
    studied_rung: str = field(role="fixed", doc="policy of best-of-N, of the weak KL penalty and of crossed seeds")
    many_rungs: tuple[str, ...] = field(role="scientific", min_length=1, doc="SFT models whose pass@k is measured")
    many_prompts: int = field(role="fixed", ge=2, doc="held-out prompts of best-of-N and pass@k")
    many_samples: int = field(role="fixed", ge=8, doc="responses to each; N and k go up to here, by doubling")
    weak_kl: float = field(role="scientific", ge=0, doc="KL coefficient that lets a policy over-optimise")
    weak_prompts: int = field(role="fixed", doc="labelled prompts of the reward models there, one of data_prompts")
    weak_updates: int = field(role="fixed", ge=WINDOWS, doc="updates there")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("policy_rungs", "reward_model_rungs", "many_rungs"):
            self.settings.check_rungs(name, getattr(self, name))
        if bad := [temperature for temperature in self.temperatures if not 0 < temperature < 1]:
            raise ValueError(f"temperatures: {bad} must be between 0 and 1, which are measured anyway")
        if self.size_prompts > self.settings.reward_prompts:
            limit = self.settings.reward_prompts
            raise ValueError(f"size_prompts: {self.size_prompts} is above the recipe's reward_prompts = {limit}")
        if bad := [count for count in self.data_prompts if not 1 <= count < self.size_prompts]:
            raise ValueError(f"data_prompts: {bad} must be from 1 to below size_prompts = {self.size_prompts}")
        for name, among in (
            ("reference_rung", "reward_model_rungs"), ("studied_rung", "many_rungs"), ("weak_prompts", "data_prompts")
        ):  # fmt: skip
            if getattr(self, name) not in getattr(self, among):
                raise ValueError(f"{name}: {getattr(self, name)!r} is not among {among}")
        if self.settings.count_bases(self.studied_rung) < 2:
            raise ValueError(f"studied_rung: {self.studied_rung} has one base; seeds are crossed with at least 2")
        if self.studied_rung not in self.policy_rungs:
            raise ValueError(f"studied_rung: {self.studied_rung!r} is not among policy_rungs")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """N of best-of-N, k of pass@k: the powers of two up to many_samples."""
        return tuple(2**power for power in range(self.many_samples.bit_length()))

    def bases(self, rung: str) -> range:
        """The pretraining seeds of a rung that its runs start from."""
        return range(1, 1 + self.settings.count_bases(rung))

    @property
    def labels(self) -> tuple[int, ...]:
        """Labelled prompts of the reference reward model, fewest first; the last are the recipe's."""
        return (*dict.fromkeys((*self.data_prompts, self.size_prompts, self.settings.reward_prompts)),)

    def reward_models(self) -> dict[tuple[str, int, int], specs.RewardModel]:
        """By rung, number of labelled prompts and seed. Those with fewer take the first of ``size_prompts``."""
        cells = [*((rung, self.size_prompts) for rung in self.reward_model_rungs)]
        cells += [(self.reference_rung, count) for count in self.labels if count != self.size_prompts]
        return {
            (rung, count, seed): self.settings.reward_model(
                rung, seed, num_prompts=count, labelled_prompts=max(count, self.size_prompts)
            )
            for (rung, count), seed in product(cells, self.seeds)
        }

    def policies(self) -> c01.Params:
        """The policies of every rung, as the figure of policy size describes them."""
        fixed = {"reward_model_rung": self.reference_rung, "other_rungs": (), "other_seeds": ()}
        return c01.Params(recipe=self.recipe, seeds=self.seeds, policy_rungs=self.policy_rungs, **fixed)

    def cooled(self, rung: str, seed: int, temperature: float) -> specs.Samples:
        """Responses of an SFT model at a temperature."""
        return self.policies().evaluations("sft", rung, seed)[0].changed(temperature=temperature)

    def many(self, rung: str) -> specs.Samples:
        return self.settings.many_samples(rung, self.many_prompts, self.many_samples)

    def chosen(self) -> dict[tuple[str, int], specs.Scores]:
        """Scores that best-of-N chooses by, of the reference and of the smallest reward model, by rung and seed."""
        found, many = self.reward_models(), self.many(self.studied_rung)
        models = {self.reward_model_rungs[0]: self.size_prompts, self.reference_rung: self.labels[-1]}
        return {
            (rung, seed): self.settings.scores(many, found[rung, count, seed])
            for (rung, count), seed in product(models.items(), self.seeds)
        }

    def weakly_held(self, seed: int) -> specs.Policy:
        """A policy with a weak KL penalty, many updates, and a reward model of few labels."""
        policy = self.settings.policy(self.studied_rung, self.reference_rung, seed)
        reward_model = self.reward_models()[self.reference_rung, self.weak_prompts, seed]
        return policy.changed(reward_model=reward_model, kl_coefficient=self.weak_kl, num_updates=self.weak_updates)

    def crossed(self) -> dict[tuple[int, int], tuple[specs.Samples, specs.Samples]]:
        """Responses before and after PPO, of every base of the studied rung with every seed."""
        recipe, found = self.settings, {}
        for base, seed in product(self.bases(self.studied_rung), self.seeds):
            start = recipe.sft(self.studied_rung, base)
            policy = recipe.policy(self.studied_rung, self.reference_rung, seed).changed(sft=start)
            found[base, seed] = recipe.evaluation(start, seed), recipe.evaluation(policy, seed)
        return found

    def specs(self) -> tuple[Spec, ...]:
        recipe = self.settings
        found = [recipe.pretrain(rung, base) for rung in self.policy_rungs for base in self.bases(rung)]
        found += [self.cooled(*cell) for cell in product(self.policy_rungs, self.seeds, self.temperatures)]
        found += [*self.policies().specs(), *self.reward_models().values()]
        found += [*map(self.many, self.many_rungs), *self.chosen().values(), *map(self.weakly_held, self.seeds)]
        found += [samples for pair in self.crossed().values() for samples in pair]
        return tuple(dict.fromkeys(found))


class _Book:
    """What the sections below write their rows into."""

    def __init__(self, P: Params, folders: Folders):
        self.P, self.folders = P, folders
        self.rows, self.summary, self.prompts = Runs(P), [], []

    def exact(self, spec: specs.Samples, rung: str, seed: int, **about) -> np.ndarray:
        """Accuracy of a model by prompt, float64 [prompt]; adds its rows."""
        values = read_responses(self.folders, spec).exact.mean(1)
        self.rows.add(spec, {"accuracy": values.mean()}, rung=rung, seed=seed, num_prompts=len(values), **about)
        self.prompts.append(per_prompt_table(spec, seed, "accuracy", values).assign(rung=rung, **about))
        return values

    def by_rung(self, quantity: str, values: np.ndarray, **about) -> dict[str, Interval]:
        """Adds a row for each rung of [rung, seed, prompt], and returns the intervals by rung."""
        means = mean_intervals(values)
        self.summary += rung_rows(quantity, self.P.policy_rungs, means, **about)
        return dict(zip(self.P.policy_rungs, means.split(), strict=True))


def measure(P: Params, folders: Folders) -> Tables:
    """Loss, accuracy before and after PPO, reward models, best-of-N, over-optimisation, and the bed's conditions."""
    book = _Book(P, folders)
    checks: list[Condition] = []
    for section in (_loss, _policies, _reward_models, _choosing, _over_optimisation, _bases):
        checks += section(book)
    _habits(book)
    extra = {"conditions.csv": pd.DataFrame(checks)}
    return Tables(book.rows.table(), pd.DataFrame(book.summary), pd.concat(book.prompts), extra=extra)


def _loss(book: _Book) -> list[Condition]:
    """Loss above the demonstrators' own against compute. Its mean is in nats for each response token."""
    P, excess, flops = book.P, [], []
    for rung in P.policy_rungs:
        of_bases = []
        for base in P.bases(rung):
            spec = P.settings.pretrain(rung, base)
            final = load_file(book.folders[spec] / "held_out.safetensors")
            of_bases.append((final["nats"] - final["demonstrators_nats"]) / final["tokens"].mean())
            last = pd.read_csv(book.folders[spec] / "loss.csv").iloc[-1]
            metrics = {"excess_loss": of_bases[-1].mean(), "heldout_loss": last["loss_nats"]}
            about = {"train_flops": last["flops"], "seed": base, "num_prompts": len(of_bases[-1])}
            book.rows.add(spec, metrics, rung=rung, **about)
            book.prompts.append(per_prompt_table(spec, base, "excess_loss", of_bases[-1]).assign(rung=rung))
        excess.append(np.mean(of_bases, axis=0))
        flops.append(last["flops"])
    found = bootstrap(np.array(excess), lambda means: means, unit="prompt", rng=new_rng(), on="means")
    for rung, compute, part in zip(P.policy_rungs, flops, found.split(), strict=True):
        about = {"rung": rung, "num_params": num_params(rung), "train_flops": compute}
        book.summary.append(summary_row("excess_loss", part, **about))
    fit = fit_with_intervals(fit_power_law, np.array(flops), np.array(excess), unit="prompt", rng=new_rng())
    exponent = fit.intervals["b"]
    book.summary += band_rows("loss_fit", "train_flops", fit, exponent)
    book.summary.append(summary_row("loss_exponent", exponent))
    book.summary.append(summary_row("loss_r2", exponent) | {"estimate": fit.r2_log} | NO_INTERVAL)
    return conditions.loss_follows_a_power_law(fit.r2_log, len(P.policy_rungs))


def _policies(book: _Book) -> list[Condition]:
    """Accuracy before PPO at every temperature, after PPO sampled and greedy, and the gains."""
    P, values = book.P, {}
    for stage, rung, seed in product(("sft", "ppo"), P.policy_rungs, P.seeds):
        sampled, greedy = P.policies().evaluations(stage, rung, seed)
        found = {1.0: sampled, 0.0: greedy}
        if stage == "sft":
            found |= {temperature: P.cooled(rung, seed, temperature) for temperature in P.temperatures}
        for temperature, spec in sorted(found.items()):
            part = book.exact(spec, rung, seed, stage=stage, temperature=temperature)
            values.setdefault((stage, temperature), []).append(part)
    shape = (len(P.policy_rungs), len(P.seeds), -1)
    accuracy = {cell: np.array(found).reshape(shape) for cell, found in values.items()}  # each [rung, seed, prompt]
    for (stage, temperature), found in accuracy.items():
        means = book.by_rung("accuracy", found, stage=stage, temperature=temperature)
        if (stage, temperature) == ("sft", 1.0):
            checks = conditions.sft_leaves_room(means)
    cooled = np.stack([found for (stage, _), found in accuracy.items() if stage == "sft"])
    margins, gains = {}, {}
    for decoding, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        after = accuracy["ppo", temperature]
        gains[decoding] = book.by_rung("gain", after - accuracy["sft", temperature], decoding=decoding)
        both = np.concatenate([cooled, after[None]])
        margin = nested_bootstrap(both, lambda m: m[-1] - m[:-1].max(0), rng=new_rng(), on="means")
        book.summary += rung_rows("above_best_temperature", P.policy_rungs, margin, decoding=decoding)
        margins[decoding] = dict(zip(P.policy_rungs, margin.split(), strict=True))
    by_seed = (accuracy["ppo", 1.0] - accuracy["sft", 1.0]).mean(2)
    checks += conditions.no_temperature_does_as_well(margins) + conditions.ppo_gains(gains)
    return checks + conditions.seeds_agree(dict(zip(P.policy_rungs, by_seed, strict=True)))


def _reward_models(book: _Book) -> list[Condition]:
    """Accuracy within a prompt, by rung and by number of labelled prompts.

    A prompt counts where its responses have unequal labels; that depends on the responses alone, not on the model.
    """
    P, found = book.P, {}
    for (rung, labelled, seed), spec in P.reward_models().items():
        # the label rungs answer the same prompts, so a prompt's accuracy is the mean over those that give it a pair
        accuracy = mean_where_known(load_file(book.folders[spec] / "held_out.safetensors")["pair_accuracy"])
        counts = np.flatnonzero(~np.isnan(accuracy))
        values, about = accuracy[counts], {"labelled_prompts": labelled}
        book.rows.add(spec, {"pair_accuracy": values.mean()}, rung=rung, seed=seed, num_prompts=len(values), **about)
        per_prompt = per_prompt_table(spec, seed, "pair_accuracy", values).assign(prompt_id=counts, rung=rung, **about)
        book.prompts.append(per_prompt)
        found.setdefault((rung, labelled), []).append(values)
    intervals = {}
    for (rung, labelled), values in found.items():
        intervals[rung, labelled] = nested_bootstrap(np.array(values), np.mean, rng=new_rng(), on="means")
        about = {"rung": rung, "num_params": num_params(rung), "labelled_prompts": labelled}
        book.summary.append(summary_row("pair_accuracy", intervals[rung, labelled], **about))
    ends = np.array([found[P.reward_model_rungs[place], P.size_prompts] for place in (0, -1)])
    rise = nested_bootstrap(ends, lambda m: m[1] - m[0], rng=new_rng(), on="means")
    book.summary.append(summary_row("pair_accuracy_rise", rise))
    return conditions.reward_models_range(intervals, P.reference_rung, rise)


def _choosing(book: _Book) -> list[Condition]:
    """Best-of-N by two reward models, and pass@k."""
    P, curves = book.P, {}
    right = read_responses(book.folders, P.many(P.studied_rung)).exact
    for (rung, seed), spec in P.chosen().items():
        curve = bon.best_of_n(right, read_scores(book.folders, spec), P.sizes)
        for size, values in zip(P.sizes, curve.T, strict=True):
            about = {"reward_model": rung, "num_responses": size, "seed": seed, "num_prompts": len(values)}
            book.rows.add(spec, {"best_of_n": values.mean()}, rung=P.studied_rung, **about)
        curves.setdefault(rung, []).append(curve)
    for rung, found in curves.items():
        means = mean_intervals(np.moveaxis(np.array(found), -1, 0))
        for size, part in zip(P.sizes, means.split(), strict=True):
            book.summary.append(summary_row("best_of_n", part, reward_model=rung, num_responses=size))
    coverage = {}
    for rung in P.many_rungs:
        found = bon.pass_at_n(read_responses(book.folders, P.many(rung)).exact, P.sizes)
        means = bootstrap(found.T, lambda means: means, unit="prompt", rng=new_rng(), on="means").split()
        about = {"rung": rung, "num_params": num_params(rung)}
        book.summary += [
            summary_row("pass_at_k", part, num_responses=size, **about)
            for size, part in zip(P.sizes, means, strict=True)
        ]
        coverage[rung] = dict(zip(P.sizes, means, strict=True))[min(64, P.sizes[-1])]
    reference, weakest = (np.array(curves[rung]) for rung in (P.reference_rung, P.reward_model_rungs[0]))
    checks = conditions.best_of_n_rises(P.sizes, reference, weakest, new_rng())
    return checks + conditions.knowledge_is_there(coverage, min(64, P.sizes[-1]))


def _over_optimisation(book: _Book) -> list[Condition]:
    """Accuracy and score on the training prompts, by part of a run with a weak KL penalty."""
    P, found = book.P, {}
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(P.weak_updates), WINDOWS)])
    for name, seed in product(("exact", "proxy", "kl_nats"), P.seeds):
        spec = P.weakly_held(seed)
        values = [part.mean() for part in np.array_split(read_metrics(book.folders, spec)[name].to_numpy(), WINDOWS)]
        found.setdefault(name, []).append(values)
        for end, value in zip(ends, values, strict=True):
            about = {"updates": end, "seed": seed, "num_prompts": P.settings.ppo_prompts}
            book.rows.add(spec, {f"weak_kl_{name}": value}, rung=P.studied_rung, **about)
    for name, values in found.items():
        means = bootstrap(np.array(values).T, lambda means: means, unit="seed", rng=new_rng(), on="means")
        for end, part in zip(ends, means.split(), strict=True):
            book.summary.append(summary_row(f"weak_kl_{name}", part, updates=end))
    return conditions.weak_kl_overoptimises(np.array(found["exact"]), np.array(found["proxy"]), new_rng())


def _bases(book: _Book) -> list[Condition]:
    """How much of a gain's variance comes from the base, and from the seed of labels, reward model and policy."""
    P, gains = book.P, {}
    for (base, seed), pair in P.crossed().items():
        before, after = (read_responses(book.folders, spec).exact.mean() for spec in pair)
        gains[base, seed] = after - before
        about = {"base": base, "seed": seed, "num_prompts": P.settings.eval_prompts}
        book.rows.add(pair[1], {"crossed_gain": after - before}, rung=P.studied_rung, **about)
    table = np.array(list(gains.values())).reshape(len(P.bases(P.studied_rung)), len(P.seeds))
    shares = conditions.variance_shares(table)
    by_seed = bootstrap(table.mean(0), np.mean, unit="seed", rng=new_rng(), on="means")
    book.summary.append(summary_row("crossed_gain", by_seed, rung=P.studied_rung))
    for name, share in shares.items():
        book.summary.append(summary_row("variance_share", by_seed, source=name) | {"estimate": share} | NO_INTERVAL)
    small = {rung: len(P.bases(rung)) for rung in P.policy_rungs if num_params(rung) < 5e5}
    return conditions.enough_seeds(len(P.seeds)) + conditions.enough_bases(small, shares)


def _habits(book: _Book) -> None:
    """Share of steps by the right rule, among those by the right or the wrong one, before and after PPO."""
    P = book.P
    for stage in ("sft", "ppo"):
        counts = []
        for seed in P.seeds:
            spec = P.policies().evaluations(stage, P.studied_rung, seed)[0]
            problems = problem_list((spec.prompt_seed, STREAM[spec.split]), spec.split, spec.families, spec.num_prompts)
            found = habits(problems, read_responses(book.folders, spec))
            counts.append([found.right, found.right + found.wrong])
        right, either = np.moveaxis(np.array(counts, float), 0, 2)  # each [operation, seed, prompt]
        tells = either.sum((1, 2)) > 0  # an operation may not occur among a few prompts
        counts = right[tells], either[tells]
        share = nested_bootstrap(counts, lambda m: m[0] / np.maximum(m[1], 1e-9), rng=new_rng(), on="means")
        names = np.array(found.operations)[tells].tolist()
        for name, demonstrators, part in zip(names, found.shares[tells], share.split(), strict=True):
            about = {"operation": name, "stage": stage, "demonstrators": demonstrators}
            book.summary.append(summary_row("right_rule", part, **about))


def draw(runs: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """The bed in six panels, see `study.bed_pictures.draw_bed`."""
    return bed_pictures.draw_bed(runs, summary)


def draw_habits(summary: pd.DataFrame) -> Figure:
    """What RLHF changed, by operation, see `study.bed_pictures.draw_habits`."""
    return bed_pictures.draw_habits(summary)
