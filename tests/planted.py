"""Artifacts of a figure of the laptop tier in which the truth is planted, and checks of the tables made from them."""

import json
import zlib
from collections.abc import Callable

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

import rlhfscale.claims  # noqa: F401  registers the figures
from rlhfscale.bed import ladder, specs
from rlhfscale.bed.responses import Responses
from rlhfscale.study import params
from rlhfscale.study.results import ResultsFolder

RUNG_STEPS = {name: step for step, name in enumerate(ladder.RUNGS)}


def planted(
    folder,
    figure: str,
    accuracy: Callable[[specs.Policy], float] = lambda policy: 0.5,
    skill: Callable[[specs.AnyRewardModel, np.ndarray], np.ndarray | float] = lambda model, family: 1.0,
    *,
    start: Callable[[specs.SFT], float] = lambda sft: 0.5,
    pairs: Callable[[specs.RewardModel], float] = lambda model: 0.7 + 0.02 * RUNG_STEPS[model.rung],
):
    """The parameters and the artifact folders by spec: policies and SFT models with the accuracies, reward models with
    the skills (how far apart their scores of right and wrong responses lie) and the shares of ordered pairs.

    A model's draws are those of every other model (their differences have little noise) but for a shift by seed.
    """
    P = params.load(figure, "laptop")
    P = type(P)(**P.model_dump() | ({"num_samples": 16} if "num_samples" in type(P).model_fields else {}))
    made = {}
    for spec in P.specs():
        made[spec] = place = folder / spec.key
        place.mkdir()
        rng = np.random.default_rng(zlib.crc32(spec.key.encode()))
        if isinstance(spec, specs.Samples):
            level = accuracy(spec.model) if isinstance(spec.model, specs.Policy) else start(spec.model)
            shape = (min(spec.num_prompts, 512), spec.num_samples)
            draws = np.random.default_rng((spec.seed, spec.num_samples)).random(shape)
            save_responses(place, draws < level + 0.002 * rng.standard_normal())
        elif isinstance(spec, specs.Policy):
            metrics(rng, spec.num_updates).to_csv(place / "metrics.csv", index=False)
            (place / "manifest.json").write_text(json.dumps({"wall_s": 3.0, "cpu_s": 2.0}))
        elif isinstance(spec, specs.RewardModel | specs.MixedRewardModel):
            found = np.where(np.arange(512) % 4, rng.random((2, 512)) < pairs(spec), np.nan)
            save_file({"pair_accuracy": found}, place / "held_out.safetensors")
        elif isinstance(spec, specs.ProcessRewardModel):
            true = rng.integers(-1, 3, 1024)
            told = np.where(rng.random(1024) < 0.8, true, (true + 2) % 4 - 1)
            columns = {"family": np.arange(1024) % 2, "first_wrong": true, "first_wrong_found": told}
            save_file(columns, place / "held_out.safetensors")
        elif isinstance(spec, specs.Pretrain):
            flops = ladder.rung(spec.rung).train_flops(16.0 * spec.num_documents, 16)
            pd.DataFrame([{"step": 1, "tokens": 1, "flops": flops, "loss_nats": 0.5}]).to_csv(place / "loss.csv")
    for spec in (spec for spec in P.specs() if isinstance(spec, specs.Scores)):
        responses = Responses.load(made[spec.samples] / "responses.safetensors")
        noise = np.random.default_rng(spec.reward_model.seed).standard_normal(responses.exact.shape)
        power = np.broadcast_to(skill(spec.reward_model, responses.family), responses.family.shape)[:, None]
        save_file({"scores": power * responses.exact + noise}, made[spec] / "scores.safetensors")
    return P, made


def metrics(rng: np.random.Generator, num_updates: int) -> pd.DataFrame:
    """A policy's updates: KL grows, gold follows d(1 - d / 4) of its square root d, the proxy rises."""
    update = np.arange(num_updates)
    d = np.sqrt(0.1 * update)
    noise = 0.002 * rng.standard_normal(num_updates)
    table = {"update": update, "kl_nats": d**2, "gold": 0.5 + 0.5 * d * (1 - d / 4) + noise, "proxy": d}
    return pd.DataFrame(table | dict.fromkeys(("exact", "finished"), 0.5) | {"response_tokens": 8.0})


def save_responses(folder, exact):
    count, ids = np.ones(exact.shape, np.int8), np.zeros((*exact.shape, 1), np.int16)
    ids[:, :, 0] = exact
    Responses(
        prompt_ids=np.zeros((len(exact), 1), np.int16), prompt_lengths=count[:, 0].astype(np.int16),
        response_ids=ids, response_lengths=count.astype(np.int16), finished=exact | True,
        gold=exact.astype(np.float32), exact=exact, steps_right=count, steps_written=count,
        family=(np.arange(len(exact)) % 2).astype(np.int8), difficulty=count[:, 0],
    ).save(folder / "responses.safetensors")  # fmt: skip


def checked(tables, tmp_path):
    """The summary by quantity, of tables as the results folder takes them: complete, finite, no run told twice."""
    folder = ResultsFolder("sweep", "smoke", tmp_path / "results")
    folder.write_runs(tables.runs)
    folder.write_summary(tables.summary)
    folder.write_per_prompt(tables.per_prompt)
    folder.write_claims(tables.claims)
    runs = folder.read("runs.csv")
    named = ["node", "metric", *(name for name in ("ladder", "seed", "family", "spent_on") if name in runs)]
    assert not runs.duplicated(named).any()
    return tables.summary.set_index("quantity")
