"""Plans for GPUs: schedules against ones worked out by hand, refusals, JSON, and that no torch is needed."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from rlhfscale.chat import specs as chat_specs
from rlhfscale.cli import app
from rlhfscale.planning.costs import DoesNotFit, Options, fitted, stage_cost
from rlhfscale.planning.hardware import HARDWARE, OF_TIER, hardware
from rlhfscale.planning.schedule import Task, critical_path_s, simulate
from rlhfscale.planning.workloads import workload


def test_a_schedule_worked_out_by_hand():
    """a (2 h) and b (1 h) are free; c needs both, d needs b: with one GPU 6 h, with two 4 h, with three 4 h."""
    tasks = {
        "a": Task(2, 1),
        "b": Task(1, 1),
        "c": Task(2, 1, ("a", "b")),
        "d": Task(1, 1, ("b",)),
    }
    for gpus, makespan, bound in ((1, 6, "total work"), (2, 4, "critical path"), (3, 4, "critical path")):
        found = simulate(tasks, gpus)
        assert (found.makespan_s, found.bound) == (makespan, bound)
        assert found.critical_path_s == 4 and found.work_s == pytest.approx(6 / gpus)
        assert found.idle == pytest.approx(1 - 6 / gpus / makespan)


def test_wide_stages_leave_gpus_idle():
    tasks = {str(number): Task(1, 3) for number in range(4)}
    found = simulate(tasks, 4)  # 3 of 4 GPUs, four times
    assert (found.makespan_s, found.idle, found.bound, found.busiest) == (4, 0.25, "widest stage", 3)


def test_earlier_groups_go_first():
    tasks = {"late": Task(1, 1, group=1), "early": Task(1, 1, group=0), "after": Task(5, 1, ("early",), group=1)}
    assert simulate(tasks, 1).makespan_s == 7
    assert simulate(tasks, 2).makespan_s == 6  # early is not kept waiting by late


def test_no_schedule_beats_its_bounds():
    rng = np.random.default_rng(0)
    for _ in range(30):
        tasks: dict[str, Task] = {}
        for number in range(25):
            parents = tuple(name for name in tasks if rng.random() < 0.15)
            tasks[f"{number:02d}"] = Task(float(rng.integers(1, 9)), int(rng.integers(0, 5)), parents, int(number > 12))
        for gpus in (4, 6, 32):
            found = simulate(tasks, gpus)
            work = sum(task.seconds * task.gpus for task in tasks.values()) / gpus
            assert found.makespan_s >= max(critical_path_s(tasks), work) - 1e-9
            assert found.busiest <= gpus and 0 <= found.idle <= 1
        assert found.makespan_s == critical_path_s(tasks) or found.busiest > 24


def test_impossible_graphs_are_refused():
    with pytest.raises(ValueError, match="a takes 2 GPUs, there are 1"):
        simulate({"a": Task(1, 2)}, 1)
    with pytest.raises(ValueError, match="a needs b, which is no task"):
        simulate({"a": Task(1, 1, ("b",))}, 1)
    with pytest.raises(ValueError, match="circle"):
        simulate({"a": Task(1, 1, ("b",)), "b": Task(1, 1, ("a",))}, 1)


def tuned(checkpoint: str, precision: str = "bf16") -> chat_specs.Tuned:
    chat = chat_specs.Chat(checkpoint=checkpoint, precision=precision)
    answers = chat_specs.Answers(
        model=chat, split="train", tasks=("lcm",), num_prompts=400, num_samples=4, max_new_tokens=32, temperature=1,
        prompt_seed=0, seed=0,
    )  # fmt: skip
    return chat_specs.Tuned(base=chat, data=answers, epochs=1, batch_size=16, lr=1e-4, lora_rank=16, seed=0)


def test_a_stage_takes_the_fewest_gpus_that_hold_it():
    options = Options(hardware("h100-80gb"), 8)
    assert stage_cost(tuned("llama-3.1-8b"), options).gpus == 1
    found = stage_cost(tuned("llama-3.1-70b"), options)
    assert found.gpus == 4
    assert 141e9 / 4 < found.memory.parts["weights"] < 141e9 / 4 + 8e9
    assert stage_cost(tuned("llama-3.1-70b", "nf4"), options).gpus == 1
    assert found.gpu_hours == pytest.approx(4 * sum(found.seconds.values()) / 3600)


def test_what_does_not_fit_is_refused_with_what_would():
    options = Options(hardware("h100-80gb"), 1)
    with pytest.raises(DoesNotFit) as refused:
        stage_cost(tuned("llama-3.1-70b"), options)
    message = str(refused.value)
    assert message.startswith("tuned (llama-3.1-70b tuned, seed 0, tuned-")
    assert "GB on each of 1 h100-80gb, 80.0 GB available; would fit: --gpus 4 or nf4" in message
    assert "\n" not in message
    four = Options(hardware("h100-80gb"), 4)
    assert fitted(workload(tuned("llama-3.1-70b")), four)


def test_hardware_is_named():
    with pytest.raises(ValueError, match="gpu: unknown GPU 'b200'; allowed: h100-80gb, a100-80gb"):
        hardware("b200")
    assert all(name in HARDWARE for name, _ in OF_TIER.values())


def plan(*options: str):
    return CliRunner().invoke(app, ["plan", "--tier", "paper", "--figure", "20", *options])


def test_the_command_refuses_with_one_line_and_code_2():
    found = plan("--gpu", "l4-24gb", "--gpus", "1")
    assert found.exit_code == 2
    assert "would fit" in found.stderr and len(found.stderr.strip().splitlines()) == 1
    for options, message in (
        (("--gpu", "abacus"), "unknown GPU 'abacus'"),
        (("--simulate", "8,many"), "'8,many' is not a list of numbers"),
    ):
        found = plan(*options)
        assert found.exit_code == 2 and message in found.stderr
    found = CliRunner().invoke(app, ["plan", "--tier", "smoke", "--figure", "20", "--json"])
    assert found.exit_code == 2 and "planned for a CPU; give --gpu too" in found.stderr


def test_the_json_adds_up():
    found = plan("--json", "--simulate", "8,64", "--usd-per-gpu-hour", "2.5", "--store", "none")
    assert found.exit_code == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["tier"] == "paper" and told["hardware"]["name"] == "h100-80gb"
    assert told["gpu_hours"] == pytest.approx(sum(stage["gpu_hours"] for stage in told["stages"]))
    assert told["usd"] == pytest.approx(2.5 * told["gpu_hours"])
    keys = {stage["key"] for stage in told["stages"]}
    for stage in told["stages"]:
        assert set(stage["parents"]) <= keys
        assert sum(stage["memory_bytes"].values()) <= told["hardware"]["memory_bytes"]
        assert stage["gpu_hours"] == pytest.approx(stage["gpus"] * sum(stage["seconds"].values()) / 3600)
    aligned = next(stage for stage in told["stages"] if stage["stage"] == "aligned")
    assert {"roll-outs", "scoring", "evaluation", "updates"} == set(aligned["flops"])
    assert [each["gpus"] for each in told["simulations"]] == [8, 64]
    assert all(each["makespan_s"] >= each["critical_path_s"] for each in told["simulations"])


def test_a_plan_of_the_paper_tier_needs_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rlhfscale.cli import app\n"
        "found = CliRunner().invoke(app, ['plan', '--tier', 'paper', '--simulate', '64', '--store', 'none'])\n"
        "assert found.exit_code == 0, found.stderr\n"
        "print([name for name in ('torch', 'transformers', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
