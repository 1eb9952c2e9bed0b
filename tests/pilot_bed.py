"""What the bed's recipe was chosen on: reward models and PPO of one pilot seed, on a base and prompts of no figure.

``python tests/pilot_bed.py`` prints the tables that stand in the CHANGELOG, in about 20 minutes of one core. The
artifacts that trials share go to the store. A trial can be named: ``python tests/pilot_bed.py rung=25k,prompts=880``.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from rlhfscale.bed import labels, ladder, rungs, specs, tasks
from rlhfscale.bed.demonstrations import STREAM, encode_prompts
from rlhfscale.bed.responses import Responses
from rlhfscale.bed.stages import draw
from rlhfscale.evals import best_of_n as bon
from rlhfscale.models import loading
from rlhfscale.rewards import outcome
from rlhfscale.rl import TRAINERS
from rlhfscale.runs import grid
from rlhfscale.study import recipes

PILOT = 9
"""Seed of the bases, labels, reward models, policies and held-out prompts; figures use seeds from 11 and bases to 3."""
RECIPE = recipes.load("laptop").model_copy(update={"num_bases": 10, "num_bases_of": {}})
LABEL_RUNGS = ("55k", "150k")
REWARD_MODELS = (
    {"rung": "150k", "prompts": 880},
    {"rung": "150k", "prompts": 14000},
    {"rung": "150k", "prompts": 56000, "loss": "pairs"},
    {"rung": "150k", "prompts": 56000, "loss": "pairs", "labels": "exact"},
    {"rung": "150k", "prompts": 56000},
    {"rung": "150k", "prompts": 112000, "responses": 2},
    {"rung": "150k", "prompts": 112000},
    {"rung": "330k", "prompts": 112000},
    {"rung": "150k", "prompts": 54000, "labellers": "bases"},
)
POLICIES = (
    {"rung": "55k"},
    {"rung": "55k", "kl_coefficient": 0.1},
    {"rung": "55k", "num_updates": 60},
    {"rung": "55k", "num_updates": 60, "kl_coefficient": 0.1},
    {"rung": "55k", "policy_lr": 0.002},
    {"rung": "55k", "critic": "separate"},
    {"rung": "150k"},
    {"rung": "150k", "num_updates": 60},
)


def samples(rung: str, split: str, prompts: int, count: int, temperature: float = 1.0) -> specs.Samples:
    spec = RECIPE.evaluation(RECIPE.sft(rung, PILOT), PILOT)
    about = {"split": split, "num_prompts": prompts, "num_samples": count, "prompt_seed": PILOT}
    return spec.changed(**about, temperature=temperature)


LABELS = {
    "pilot": [samples(rung, "train", 56000, 4) for rung in LABEL_RUNGS],
    "bases": list(recipes.load("laptop").reward_model("150k", PILOT).data),
}
"""Labelled responses of the pilot's own base, both rungs to the same prompts; and as the recipe has them, of every base
of the figures, each to prompts of its own. Accuracy is measured on the pilot's responses."""
HELD_OUT = samples("55k", "eval", 512, 64)


def read(made: grid.Results, spec: specs.Samples) -> Responses:
    return Responses.load(made[spec] / "responses.safetensors")


def first(responses: Responses, prompts: int, count: int) -> Responses:
    """The first samples of the first prompts."""
    cut = {name: array[:prompts] for name, array in vars(responses).items()}
    return Responses(**{name: array[:, :count] if array.ndim > 1 and name != "prompt_ids" else array
                        for name, array in cut.items()})  # fmt: skip


def reward_model(made, rung, prompts, responses=4, loss="both", labels_by="gold", labellers="pilot"):
    """Train one as the recipe does, and print what it can do; ``labels_by`` exact compares right with wrong alone."""
    parts = LABELS[labellers]
    data = [labels.labelled(first(read(made, spec), prompts // len(parts), responses)) for spec in parts]
    if labels_by == "exact":
        data = [replace(part, gold=part.correct) for part in data]
    started = time.process_time()
    model, _ = outcome.train(
        loading.load_scorer(made[RECIPE.sft(rung, PILOT)] / "model", init_seed=PILOT), data, epochs=1,
        prompts_per_batch=RECIPE.reward_batch, lr=RECIPE.reward_lr_width / ladder.rung(rung).width,
        muon_lr=RECIPE.reward_muon_lr, lora_rank=0, readout=RECIPE.reward_readout, loss=loss, seed=(PILOT, 0),
    )  # fmt: skip
    seconds = time.process_time() - started
    reward = outcome.OutcomeRewardModel(model, rungs.build_tokenizer(), RECIPE.reward_readout)
    held_out = read(made, HELD_OUT)
    scores = labels.scores_of(reward, held_out)
    reward.calibrate(scores.ravel())
    graded, exact = (
        np.nanmean(outcome.pair_accuracy(scores[:, :8], gold[:, :8] * 1.0)) for gold in (held_out.gold, held_out.exact)
    )
    curve = " ".join(f"{value:.3f}" for value in bon.best_of_n(held_out.exact, scores, [1, 8, 16, 64]).mean(0))
    about = f"{rung}, {prompts:,} prompts x {responses}, {loss}, {labels_by}, {labellers}"
    print(f"| {about} | {seconds:.0f} | {graded:.3f} | {exact:.3f} | {curve} |", flush=True)
    return reward


def policy(made, reward, rung, **changes) -> None:
    """Train one as the recipe does, with changes, and print its accuracy on held-out prompts."""
    spec = RECIPE.policy(rung, "150k", PILOT).changed(**changes)
    trainer, config = TRAINERS["ppo"]
    names = config.model_fields.keys() & type(spec).model_fields.keys()
    settings = config(**{name: getattr(spec, name) for name in names}, max_new_tokens=tasks.MAX_RESPONSE_TOKENS)
    base = loading.load_policy(made[RECIPE.sft(rung, PILOT)] / "model")
    run = trainer(base, rungs.build_tokenizer(), reward.normalised(), settings, seed=PILOT)
    stream = tasks.problems((PILOT, STREAM["policy"]), "train")
    started = time.process_time()
    metrics = run.train(
        lambda _: encode_prompts([next(stream) for _ in range(spec.prompts_per_update)]),
        spec.num_updates,
        progress=False,
    )
    seconds = time.process_time() - started
    model = run.networks.merged_policy()
    sampled, greedy = (
        draw(samples(rung, "eval", 512, count, temperature), model).exact.mean()
        for count, temperature in ((8, 1.0), (1, 0.0))
    )
    about = ", ".join([rung, *(f"{name} {value}" for name, value in changes.items())])
    kl = metrics["kl_nats"].tail(5).mean()
    print(f"| {about} | {seconds:.0f} | {sampled:.3f} | {greedy:.3f} | {kl:.2f} |", flush=True)


def parse(text: str) -> dict:
    pairs = (part.split("=") for part in text.split(","))
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    tuned = [RECIPE.sft(rung, PILOT) for rung in ("55k", "150k", "330k")]
    made = grid.ensure([*LABELS["pilot"], *LABELS["bases"], HELD_OUT, *tuned])
    print("| reward model | core-s | unequal gold | right or wrong | best of 1, 8, 16, 64 |\n|---|---|---|---|---|")
    reference = None
    for trial in map(parse, chosen) if chosen else REWARD_MODELS:
        options = dict(trial)
        by = options.pop("labels", "gold")
        reward = reward_model(made, labels_by=by, **options)
        if options.get("labellers") == "bases":
            reference = reward
    if reference is not None:
        print("\n| PPO | core-s | sampled | greedy | KL |\n|---|---|---|---|---|")
        for trial in POLICIES:
            policy(made, reference, **trial)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    main(sys.argv[1:])
