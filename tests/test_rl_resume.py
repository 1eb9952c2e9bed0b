"""Stopping, being killed and going on: a run that was broken off ends with the numbers of one that was not."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_rl
from rlhfscale.rl import GRPO, PPO, RLOO, learner
from rlhfscale.rl.logs import METRICS
from rlhfscale.rl.outer import CHECKPOINT

UPDATES, EVERY = 6, 2
OPTIONS = {"prompts_per_update": 4, "minibatch_size": 4, "epochs": 1, "policy_lr": 1e-2, "warmup_updates": 3}
RUNS = {
    "ppo": (PPO, {}),
    "ppo, separate critic": (PPO, {"critic": "separate"}),
    "ppo, all weights": (PPO, {"adapter": "none", "policy_lr": 1e-3}),
    "ppo, all weights, separate critic": (PPO, {"adapter": "none", "critic": "separate", "policy_lr": 1e-3}),
    "ppo, adaptive": (PPO, {"kl_target": 0.5, "kl_horizon": 100, "weight_decay": 0.1}),
    "ppo, bfloat16 layers": (PPO, {"compute_dtype": "bf16"}),
    "grpo": (GRPO, {}),
    "grpo, all weights, adaptive": (GRPO, {"adapter": "none", "policy_lr": 1e-3, "kl_target": 0.5, "kl_horizon": 100}),
    "rloo": (RLOO, {"kl_target": 0.5, "kl_horizon": 100}),
}


class Stop(Exception):
    pass


def new(kind="ppo", **changes):
    algorithm, options = RUNS[kind]
    return tiny_rl.trainer(algorithm, **OPTIONS | options | changes)


def train(run, folder, updates=UPDATES, stop_at=None):
    """Train on a list of prompts that several updates pass through more than once; break off after an update."""

    def on_update(update, metrics, completions):
        if update == stop_at:
            raise Stop
        return {"responses": len(completions)}

    options = {"folder": folder, "checkpoint_every": EVERY, "progress": False, "on_update": on_update}
    return run.train(tiny.prompts(10), updates, **options)


def state(run):
    """Everything that decides how a run goes on: weights, the optimiser's moments, counters."""
    optimizer = {
        f"{index}.{name}": tensor
        for index, entry in run.learner.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    return tiny.weights(run.networks) | optimizer, (run.num_updates, run.kl_coefficient)


def assert_same(run, other):
    (weights, rest), (expected, expected_rest) = state(run), state(other)
    assert tiny.equal(weights, expected) and rest == expected_rest


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Runs that never stopped, each made once: the trainer, its folder and what it returned."""
    made = {}

    def get(kind):
        if kind not in made:
            folder, run = tmp_path_factory.mktemp("unbroken"), new(kind)
            made[kind] = run, folder, train(run, folder)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_ends_as_if_it_had_never_stopped(kind, unbroken, tmp_path):
    """Broken off twice, at random updates, and resumed by fresh objects: weights, moments and metrics are identical."""
    whole, folder, table = unbroken(kind)
    stops = np.random.default_rng(list(kind.encode())).integers(0, UPDATES, 2)
    for stop in sorted(stops.tolist()):
        with pytest.raises(Stop):
            train(new(kind), tmp_path, stop_at=stop)
    run = new(kind)
    found = train(run, tmp_path)
    assert_same(run, whole)
    assert (tmp_path / METRICS).read_bytes() == (folder / METRICS).read_bytes()
    pd.testing.assert_frame_equal(found, table, check_exact=True)
    assert table["update"].tolist() == list(range(UPDATES)) and (table["responses"] == 8).all()
    if "kl_target" in RUNS[kind][1]:
        assert table["kl_coefficient"].nunique() == UPDATES


def test_a_run_without_a_folder_is_the_same_run(unbroken):
    whole, _, table = unbroken("ppo")
    run = new("ppo")
    found = run.train(tiny.prompts(10), UPDATES, progress=False)
    assert_same(run, whole)
    pd.testing.assert_frame_equal(found, table.drop(columns="responses"), check_exact=True)


def test_a_longer_run_goes_on_from_a_finished_one(unbroken, tmp_path):
    whole, _, _ = unbroken("grpo")
    train(new("grpo"), tmp_path, updates=3)
    run = new("grpo")
    assert len(train(run, tmp_path)) == UPDATES
    assert_same(run, whole)
    again = new("grpo")
    assert train(again, tmp_path).equals(pd.read_csv(tmp_path / METRICS, float_precision="round_trip"))
    assert_same(again, whole)  # nothing was left to do


def test_prompts_may_be_a_function_of_the_update(tmp_path):
    asked, prompts = [], tiny.prompts(40)

    def source(update):
        asked.append(update)
        return prompts[4 * update : 4 * update + 4]

    whole = new()
    whole.train(source, UPDATES, progress=False)
    for updates in (2, UPDATES):
        run = new()
        run.train(source, updates, folder=tmp_path, checkpoint_every=1, progress=False)
    assert asked == [*range(UPDATES), *range(UPDATES)]
    assert_same(run, whole)


def test_a_list_of_prompts_is_passed_through_without_replacement():
    run, prompts = new(), tiny.prompts(10)
    draw = run._shuffled(prompts)
    drawn = [prompts.index(prompt) for update in range(5) for prompt in draw(update)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert draw(3) == run._shuffled(prompts)(3)  # of the update alone


# --- being killed ---


class Killed(BaseException):
    """Not an Exception, so that no handler tidies up."""


class Dying:
    """Dies at the n-th change of the file system that saving makes."""

    def __init__(self, monkeypatch, at):
        self.left = at
        for owner, name in (
            (shutil, "rmtree"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"),
            (learner, "save_file"), (pd.DataFrame, "to_csv"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function):
        def call(*arguments, **options):
            if self.left == 0:
                raise Killed
            self.left -= 1
            return function(*arguments, **options)

        return call


class Networks(torch.nn.Linear):
    """The least that a learner can save."""

    fingerprint = "0"

    def parameters_of(self, role):
        return list(self.parameters())

    def save(self, folder):
        save_file(self.state_dict(), folder / "weights.safetensors")

    def load(self, folder):
        self.load_state_dict(load_file(folder / "weights.safetensors"))


def test_a_kill_at_any_moment_of_saving_leaves_a_checkpoint(tmp_path, monkeypatch):
    """Also when the next attempt is killed too, with only the predecessor's folder left by the first."""
    networks = Networks(2, 1)
    options = {"warmup_updates": 0, "weight_decay": 0.0, "max_grad_norm": 1.0}
    learns, checkpoint = learner.Learner(networks, {"policy": 1e-3}, **options), tmp_path / CHECKPOINT
    with learns.step(0):
        networks.weight.sum().backward()
    killed_twice = 0
    for first, second in itertools.product(range(12), repeat=2):
        shutil.rmtree(tmp_path)
        learns.save(checkpoint, {"attempt": 0})
        killed, done = 0, 0
        for attempt, at in enumerate((first, second), 1):
            with monkeypatch.context() as patch:
                Dying(patch, at)
                try:
                    learns.save(checkpoint, {"attempt": attempt})
                    done = attempt
                except Killed:
                    killed += 1
            assert done <= learns.load(checkpoint, {})["attempt"] <= attempt, (first, second)
        killed_twice += killed == 2
    assert 25 < killed_twice < 144 and done == 2  # the last of them were not killed at all


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9])
def test_a_kill_while_a_run_saves_costs_no_row_of_the_metrics(at, unbroken, tmp_path, monkeypatch):
    whole, folder, _ = unbroken("ppo")
    train(new(), tmp_path, updates=EVERY)
    with monkeypatch.context() as patch:
        Dying(patch, at)
        with contextlib.suppress(Killed):
            train(new(), tmp_path)
    run = new()
    train(run, tmp_path)
    assert_same(run, whole)
    assert (tmp_path / METRICS).read_bytes() == (folder / METRICS).read_bytes()


def test_the_predecessor_of_a_checkpoint_is_enough(unbroken, tmp_path):
    """As a process killed between two renames leaves it."""
    whole, _, _ = unbroken("ppo")
    train(new(), tmp_path, updates=4)
    shutil.rmtree(tmp_path / CHECKPOINT)
    (tmp_path / (CHECKPOINT + ".tmp")).mkdir()  # half written
    run = new()
    train(run, tmp_path)
    assert_same(run, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, CHECKPOINT + ".old", METRICS]


def largest_file(folder):
    return max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    """Of the last digit there is, or of the last byte of a file of numbers."""
    content = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    content[digits[-1] if path.suffix == ".json" else -1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("of", [largest_file, lambda folder: folder / learner.STATE], ids=["weights", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, of, unbroken, tmp_path):
    whole, folder, _ = unbroken("ppo")
    train(new(), tmp_path, updates=4)
    victim = of(tmp_path / CHECKPOINT)
    damage(victim)
    run = new()
    with pytest.warns(UserWarning, match=f"damaged checkpoint: {victim}.*; going on from .*{CHECKPOINT}.old"):
        train(run, tmp_path)
    assert_same(run, whole)
    assert (tmp_path / METRICS).read_bytes() == (folder / METRICS).read_bytes()


def test_two_damaged_checkpoints_are_both_named(tmp_path):
    train(new(), tmp_path, updates=4)
    victims = [largest_file(tmp_path / name) for name in (CHECKPOINT, CHECKPOINT + ".old")]
    for victim in victims:
        cut_in_half(victim)
    with pytest.raises(learner.CheckpointError, match=f"{victims[0]} has changed.*; {victims[1]} has changed"):
        train(new(), tmp_path)


SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
import test_rl_resume as test
test.train(test.new("ppo"), sys.argv[1], updates=10**6)
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_ends_as_if_it_had_never_been(tmp_path):
    """SIGKILL at a random moment of an endless run, then a resume by this process."""
    path = [str(Path(__file__).parent), *sys.path]
    with subprocess.Popen([sys.executable, "-c", SCRIPT.format(path=path), str(tmp_path)]) as process:
        deadline = time.monotonic() + 300
        while not learner.exists(tmp_path / CHECKPOINT):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(float(np.random.default_rng(0).uniform(0, 0.5)))
        os.kill(process.pid, signal.SIGKILL)
    done = json.loads((learner.latest(tmp_path / CHECKPOINT) / learner.STATE).read_text())["num_updates"]
    assert done >= EVERY
    run, whole = new(), new()
    found, expected = train(run, tmp_path, updates=done + 3), train(whole, None, updates=done + 3)
    assert_same(run, whole)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


# --- checkpoints of other runs ---


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("grpo", {}, "algorithm: ppo there, grpo here"),
        ("ppo", {"seed": 3}, "seed: 0 there, 3 here;"),
        ("ppo", {"policy_lr": 0.5}, r"another run: policy_lr: 0\.01 there, 0\.5 here; resume"),
        ("ppo", {"lora_rank": 2}, "another run: lora_rank: 4 there, 2 here"),
        ("ppo", {"base": lambda: tiny.model(seed=5)}, "another run: model: [0-9a-f]{16} there, [0-9a-f]{16} here"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(kind, changes, message, unbroken):
    """What differs is named, and nothing of it is read."""
    _, folder, _ = unbroken("ppo")
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    run = new(kind, **changes)
    before = state(run)
    with pytest.raises(learner.CheckpointError, match=message) as error:
        run.load(folder / CHECKPOINT)
    assert str(folder / CHECKPOINT) in str(error.value)
    with pytest.raises(learner.CheckpointError):
        train(run, folder)
    assert tiny.equal(state(run)[0], before[0]) and state(run)[1] == before[1]


def test_a_run_goes_on_with_its_own_prompts_only(tmp_path):
    """In any kind of collection; a function's prompts are not known beforehand."""
    train(new(), tmp_path, updates=2)
    with pytest.raises(learner.CheckpointError, match=r"another run: prompts: [0-9a-f]{16} there, [0-9a-f]{16} here"):
        new().train(tiny.prompts(9), 4, folder=tmp_path, progress=False)
    options = {"folder": tmp_path, "checkpoint_every": EVERY, "progress": False}
    assert len(new().train(iter(tiny.prompts(10)), 4, **options)) == 4
    assert len(new().train(lambda update: tiny.prompts(4, seed=update), 5, **options)) == 5


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(learner.CheckpointError, match=f"{tmp_path}.*no checkpoint there"):
        new().load(tmp_path / CHECKPOINT)
    assert not learner.exists(tmp_path / CHECKPOINT)


def test_targets_given_as_names_are_the_same_after_saving(tmp_path):
    """A tuple is a list in JSON."""
    run = new(lora_targets=("q_proj", "v_proj"))
    run.save(tmp_path / CHECKPOINT)
    new(lora_targets=("q_proj", "v_proj")).load(tmp_path / CHECKPOINT)


def test_a_checkpoint_holds_no_pickle(unbroken):
    """Weights are safetensors, the rest JSON: a checkpoint of others can be opened without running their code."""
    for kind in ("ppo", "ppo, all weights, separate critic"):
        _, folder, _ = unbroken(kind)
        files = {path.suffix for path in (folder / CHECKPOINT).rglob("*") if path.is_file()}
        assert files <= {".safetensors", ".json", ".md", ".jinja"}


def test_a_saved_run_goes_on_to_the_same_numbers_by_hand(tmp_path):
    """`update`, `save` and `load` without `train`."""
    whole, prompts = new("ppo, separate critic"), [tiny.prompts(4, seed=update) for update in range(4)]
    expected = [whole.update(part)[0] for part in prompts]
    run = new("ppo, separate critic")
    found = [run.update(part)[0] for part in prompts[:2]]
    run.save(tmp_path / "any name")
    run = new("ppo, separate critic")
    run.load(str(tmp_path / "any name"))
    found += [run.update(part)[0] for part in prompts[2:]]
    assert found == expected
    assert_same(run, whole)
    assert torch.is_grad_enabled()
