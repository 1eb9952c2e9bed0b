"""Whether our PPO learns as much as trl's from equally many roll-outs, on the laptop test bed.

``python tests/learning_against_trl.py --peer-python PEER --store STORE --out FOLDER`` trains the laptop recipe's SFT
policy with both sides against the same frozen reward models, on the same prompts, and grades both by the verifier on
the same held-out prompts. Written to FOLDER:

    learning.csv          one row for each side, variant and seed
    learning_summary.csv  ours minus trl, paired over seeds, with a 95% t-interval, for each of our variants
    learning_choice.csv   trl's learning rates tried on seed 0, which is in no comparison: the best by gold is used
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from rlhfscale.bed import rungs, tasks
from rlhfscale.bed.demonstrations import STREAM, encode_prompts, problem_list
from rlhfscale.bed.recipe import Recipe
from rlhfscale.bed.responses import label
from rlhfscale.bed.specs import Policy
from rlhfscale.bench.rounds import ChildDied, environment
from rlhfscale.models import loading
from rlhfscale.models.sequences import Sequences
from rlhfscale.rewards import outcome
from rlhfscale.rl import PPO, PPOConfig
from rlhfscale.runs import grid
from rlhfscale.runs.store import Store
from rlhfscale.samplers import hf, request_seeds
from rlhfscale.study import recipes

REWARD_RUNG = "150k"
VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {"critic": "separate"},
    "trunk": {"critic": "trunk"},
    "trunk bf16": {"critic": "trunk", "compute_dtype": "bf16"},
}
"""Ours: what each changes in the recipe's PPO."""

PEER = Path(__file__).with_name("peer_trl_learning.py")
PEER_RATES = (1e-3, 3e-4)
CHOICE_SEED = 0
NUM_CHECKED = 64


@dataclass(frozen=True)
class Bed:
    """What both sides share of a seed.

    Attributes:
        spec: the recipe's policy, with the number of updates asked for.
        sft, reward: folders of the policy to train and of the reward model.
    """

    spec: Policy
    sft: Path
    reward: Path

    @property
    def rollouts(self) -> int:
        return self.spec.num_updates * self.spec.prompts_per_update

    def prompts(self) -> list[list[list[int]]]:
        """Token ids of each update's prompts, those of the recipe's policy stage."""
        stream = tasks.problems((self.spec.seed, STREAM["policy"]), "train", self.spec.sft.families)
        count = self.spec.prompts_per_update
        return [encode_prompts(list(islice(stream, count))) for _ in range(self.spec.num_updates)]

    def load_reward(self) -> Any:
        return outcome.OutcomeRewardModel.load(self.reward).normalised()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    beds = prepare(options.rung, options.updates, [CHOICE_SEED, *options.seeds], Store(options.store))
    recipe = recipes.load("laptop")
    rate = choose_rate(recipe, beds[CHOICE_SEED], options)
    rows = []
    for seed in options.seeds:
        start = evaluate(recipe, loading.load_policy(beds[seed].sft), seed)
        for side, variant in [("ours", name) for name in VARIANTS] + [("trl", "full critic")]:
            rows.append(run(recipe, beds[seed], side, variant, rate, options.peer_python) | before_of(start))
            pd.DataFrame(rows).to_csv(options.out / "learning.csv", index=False)
    table = summary(pd.DataFrame(rows), command(options))
    table.to_csv(options.out / "learning_summary.csv", index=False)
    say(table.drop(columns="command").to_string(index=False))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/learning_against_trl.py", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", required=True, help="Python of the environment of requirements/bench.txt")
    parser.add_argument("--store", help="artifact store, a folder or a URL; what is missing there is made")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rung", default="55k", help="of the policy")
    parser.add_argument("--updates", type=int, default=30)
    options = parser.parse_args(arguments)
    if len(set(options.seeds)) < len(options.seeds) or CHOICE_SEED in options.seeds or len(options.seeds) < 2:
        parser.error(f"--seeds: at least two different ones, without {CHOICE_SEED}, which chooses the peer's rate")
    return options


def command(options: argparse.Namespace) -> str:
    """The command without this machine's paths."""
    seeds = " ".join(map(str, options.seeds))
    return f"python tests/learning_against_trl.py --seeds {seeds} --rung {options.rung} --updates {options.updates}"


def prepare(rung: str, updates: int, seeds: Sequence[int], store: Store) -> dict[int, Bed]:
    """The recipe's models of each seed, from the store or made there."""
    recipe = recipes.load("laptop")
    policies = {seed: recipe.policy(rung, REWARD_RUNG, seed) for seed in seeds}
    made = grid.ensure(
        [spec for policy in policies.values() for spec in (policy.sft, policy.reward_model)], store=store
    )
    return {
        seed: Bed(
            spec.changed(num_updates=updates),
            made[spec.sft] / "model",
            made[spec.reward_model] / "model",
        )
        for seed, spec in policies.items()
    }


def choose_rate(recipe: Recipe, bed: Bed, options: argparse.Namespace) -> float:
    """The peer's learning rate with the highest gold; all that were tried are written down."""
    rows = [run(recipe, bed, "trl", "full critic", rate, options.peer_python) for rate in PEER_RATES]
    table = pd.DataFrame(rows)
    chosen = table["learning_rate"][table["gold"].idxmax()]
    table.assign(chosen=table["learning_rate"] == chosen).to_csv(options.out / "learning_choice.csv", index=False)
    say(f"trl's learning rate: {chosen:g}")
    return float(chosen)


def run(recipe: Recipe, bed: Bed, side: str, variant: str, peer_rate: float, peer_python: str) -> dict[str, Any]:
    """Train one side and grade it: a row of learning.csv."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            model, about = train_ours(bed, VARIANTS[variant])
        else:
            model, about = train_peer(bed, peer_rate, peer_python, Path(folder))
        graded = evaluate(recipe, model, bed.spec.seed)
    row = {
        "side": side,
        "variant": variant,
        "seed": bed.spec.seed,
        "updates": bed.spec.num_updates,
        "rollouts": bed.rollouts,
        **graded,
        **about,
    }
    gold = f"gold {row['gold']:.4f}, exact {row['exact']:.4f}, KL {row['kl_nats']:.2f} nats"
    rate = f"learning rate {row['learning_rate']:g}"
    say(f"seed {row['seed']}, {side} ({variant}), {rate}: {gold}, {time.perf_counter() - start:.0f} s")
    return row


def before_of(graded: Mapping[str, float]) -> dict[str, float]:
    """Columns of the policy before training: gold in ``before``."""
    return {"before": graded["gold"], "before_exact": graded["exact"]}


def train_ours(bed: Bed, changes: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The policy that ours trained, adapter merged; its learning rate and last KL."""
    names = PPOConfig.model_fields.keys() & type(bed.spec).model_fields.keys()
    fields = {name: getattr(bed.spec, name) for name in names}
    config = PPOConfig(**fields | {"max_new_tokens": tasks.MAX_RESPONSE_TOKENS, **changes})
    trainer = PPO(loading.load_policy(bed.sft), rungs.build_tokenizer(), bed.load_reward(), config, seed=bed.spec.seed)
    prompts = bed.prompts()
    metrics = trainer.train(lambda update: prompts[update], bed.spec.num_updates, progress=False)
    about = {"learning_rate": config.policy_lr, "kl_nats": metrics["kl_nats"].iloc[-1]}
    return trainer.networks.merged_policy(), about


def train_peer(bed: Bed, rate: float, peer_python: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The policy that trl trained, and what it says of its run.

    Raises:
        ChildDied: trl failed; with the last lines of its standard error.
        RuntimeError: it made another number of roll-outs or optimiser steps than ours.
    """
    (folder / "job.json").write_text(json.dumps(peer_job(bed, rate, folder)))
    done = subprocess.run(
        [peer_python, str(PEER), str(folder / "job.json")], env=environment(1, True), capture_output=True, text=True
    )
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise ChildDied(f"trl ended with exit code {done.returncode}; the last lines of its standard error:\n{tail}")
    result = json.loads((folder / "result.json").read_text())
    spec = bed.spec
    steps = spec.num_updates * spec.epochs * (spec.prompts_per_update // spec.minibatch_size)
    if (result["rollouts"], result["optimizer_steps"]) != (bed.rollouts, steps):
        raise RuntimeError(f"trl made {result['rollouts']} roll-outs and {result['optimizer_steps']} optimiser steps")
    about = {"learning_rate": rate, "kl_nats": result["kl_nats"][-1], "score_gap": result["score_gap"]}
    return loading.load_policy(folder / "model"), about


def peer_job(bed: Bed, rate: float, folder: Path) -> dict[str, Any]:
    """The peer's job: the recipe's PPO in trl's words."""
    spec = bed.spec
    return {
        "model": str(bed.sft),
        "reward": str(bed.reward),
        "prompts": [prompt for update in bed.prompts() for prompt in update],
        "batch": spec.prompts_per_update,
        "lora_rank": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "options": {
            "response_length": tasks.MAX_RESPONSE_TOKENS,
            "num_ppo_epochs": spec.epochs,
            "num_mini_batches": spec.prompts_per_update // spec.minibatch_size,
            "learning_rate": rate,
            "temperature": spec.temperature,
            "kl_coef": spec.kl_coefficient,
            "cliprange": spec.clip,
            "cliprange_value": spec.value_clip,
            "vf_coef": spec.value_coefficient,
            "gamma": spec.gamma,
            "lam": spec.lam,
            "missing_eos_penalty": spec.missing_eos_penalty,
        },
        "check": checked_scores(bed),
        "out": str(folder),
        "threads": 1,
        "seed": spec.seed,
    }


def checked_scores(bed: Bed) -> dict[str, Any]:
    """Sampled responses with our scores, which the peer's must equal."""
    prompts = bed.prompts()[0][:NUM_CHECKED]
    seeds = request_seeds((bed.spec.seed, STREAM["samples"]), len(prompts))
    drawn = hf.sample(
        loading.load_policy(bed.sft), prompts, seeds=seeds, max_new_tokens=tasks.MAX_RESPONSE_TOKENS, temperature=1.0
    )
    responses = [list(completion.token_ids) for completion in drawn]
    scores = bed.load_reward().score(Sequences.join(prompts, responses, drawn.finished))
    return {"prompts": prompts, "responses": responses, "scores": scores.tolist()}


def evaluate(recipe: Recipe, model: Any, seed: int) -> dict[str, float]:
    """Exact accuracy and gold on the recipe's held-out prompts, sampled by our sampler, as its stages do."""
    problems = problem_list((1, STREAM["eval"]), "eval", tuple(tasks.FAMILIES), recipe.eval_prompts)
    prompts = [prompt for prompt in encode_prompts(problems) for _ in range(recipe.eval_samples)]
    seeds = request_seeds((seed, STREAM["samples"], STREAM["eval"]), len(prompts))
    drawn = hf.sample(model.eval(), prompts, seeds=seeds, max_new_tokens=tasks.MAX_RESPONSE_TOKENS, temperature=1.0)
    graded = label(problems, drawn)
    return {"exact": float(graded.exact.mean()), "gold": float(graded.gold.mean())}


def summary(rows: pd.DataFrame, how: str) -> pd.DataFrame:
    """For each of our variants and each metric: ours minus trl, paired over seeds, with a 95% t-interval."""
    by_seed = rows.set_index(["variant", "seed"])
    table = []
    for variant in VARIANTS:
        for metric, before in (("exact", "before_exact"), ("gold", "before")):
            mine, theirs = by_seed.loc[variant][metric], by_seed.loc["full critic"][metric]
            mean, low, high = interval((mine - theirs).to_numpy())
            row = {"variant": variant, "metric": metric, "seeds": len(mine), "rollouts": rows["rollouts"].iloc[0]}
            row |= {"before": by_seed.loc[variant][before].mean(), "ours": mine.mean(), "trl": theirs.mean()}
            row |= {"difference": mean, "ci_low": low, "ci_high": high}
            row["trl_learning_rate"] = by_seed.loc["full critic"]["learning_rate"].iloc[0]
            table.append(row | {"command": how})
    return pd.DataFrame(table)


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95% t-interval of paired differences."""
    mean, count = float(differences.mean()), len(differences)
    half = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return mean, mean - half, mean + half


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
