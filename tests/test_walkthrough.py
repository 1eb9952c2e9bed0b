"""The walkthrough: its numbers by hand are the library's, its rules for prose and cells, a run from start to end."""

import re
import statistics
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch

from rlhfscale.claims import walkthrough
from rlhfscale.rl import advantages, kl, losses
from rlhfscale.runs.paths import project_root
from rlhfscale.study import params

ROOT = project_root()
NOTEBOOK = ROOT / "notebooks" / "00_walkthrough.ipynb"


@pytest.fixture(scope="module")
def cells():
    return nbformat.read(NOTEBOOK, as_version=4).cells


def code_before_the_live_run(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    stop = next(index for index, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    return [cell.source for cell in code[:stop]]


def execute(sources):
    found = {}
    for index, text in enumerate(sources):
        exec(compile(text, f"cell {index}", "exec"), found)  # the project's own text
    return found


def test_the_numbers_by_hand_are_those_of_the_library(cells):
    sources = code_before_the_live_run(cells)
    assert sum(text.count("assert walkthrough.same(") for text in sources) >= 15
    found = execute(sources)
    assert found["advantages_1"] == [0.4375, 0.375]
    assert found["rollouts"].finished.tolist() == [True, True, True, False]
    assert found["rollouts"].mask.sum().item() == 16


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (kl, "kl_terms"),
        (kl, "sequence_kl"),
        (advantages, "whiten"),
        (advantages, "group_relative"),
        (advantages, "leave_one_out"),
        (losses, "clipped_value"),
        (losses, "token_weights"),
    ],
)
def test_a_library_that_is_off_by_a_digit_is_noticed(cells, monkeypatch, module, name):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **options: right(*given, **options) * (1 + 1e-6))
    with pytest.raises(AssertionError):
        execute(code_before_the_live_run(cells))


def test_same_means_the_last_digit_of_float32():
    assert walkthrough.same(0.1, torch.tensor(0.1, dtype=torch.float64))
    assert not walkthrough.same(0.1, torch.tensor(0.1 * (1 + 2e-7), dtype=torch.float64))
    assert walkthrough.same([[1.0], [2.0, 3.0]], torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    assert not walkthrough.same([[1.0], [2.0, 3.0]], torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
    assert not walkthrough.same([1.0, 2.0], torch.tensor([1.0]))


def test_prose_and_cells(cells):
    code = [cell for cell in cells if cell.cell_type == "code"]
    lines = [len(cell.source.splitlines()) for cell in code]
    assert len(cells) - len(code) >= len(code)
    assert statistics.median(lines) <= 5 and max(lines) <= 15
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    exercises = len(re.findall(r"^\*\*\d+\. ", prose, re.MULTILINE))
    assert exercises >= 4
    assert prose.count("<details><summary>Answer</summary>\n\n") == prose.count("</details>") == exercises
    assert prose.count("$$") % 2 == 0 and prose.count("$$") >= 20


def test_the_live_settings_reuse_the_models_and_the_others_do_not():
    tier = params.load("00_walkthrough", "smoke")

    def keys(**change):
        return [spec.key for spec in walkthrough.Params(**tier.model_dump() | change).specs()]

    live = {"seed": 2, "num_updates": 4, "prompts_per_update": 64, "epochs": 1, "policy_lr": 0.1}
    assert keys(**live, kl_coefficient=0.0, clip=0.1, lam=0.5) == keys()
    for change in ({"pretrain_documents": 2001}, {"sft_documents": 1001}, {"slip": 0.2}, {"rung": "25k"}):
        assert not set(keys(**change)) & set(keys()), change
    assert keys(label_prompts=101)[1] != keys()[1]


def test_token_table_and_pictures_of_any_numbers():
    responses = ["a <eos>", "b a <eos>", "a", "b b"]
    rows = [[1.0, 0.0], [0.0, -1.0, 2.0], [0.5], [1.0, 1.0]]
    table = walkthrough.token_table(responses, reward=rows)
    assert table.loc[("y2", "reward")].tolist() == ["0", "-1", "2"]
    assert table.loc[("y3", "token")].tolist() == ["a", "", ""]
    for picture in (walkthrough.token_bars(responses, {"reward": rows}), walkthrough.pipeline()):
        assert picture._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHFSCALE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RLHFSCALE_RESULTS", str(tmp_path / "results"))
    values, done = ROOT / "params/smoke/00_walkthrough.yaml", tmp_path / "done.ipynb"
    command = [sys.executable, "-m", "papermill", NOTEBOOK, done, "-f", values, "-k", "python3", "--no-progress-bar"]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True, text=True)
    folder = tmp_path / "results" / "smoke" / "00_walkthrough"
    runs = pd.read_csv(folder / "runs.csv")
    assert {"gold", "proxy", "kl_nats", "sampled_exact"} <= set(runs["metric"])
    assert runs.loc[runs["metric"] == "gold", "update"].tolist() == [0, 1, 2]
    assert {"figure.png", "figure.svg", "manifest.json", "summary.csv"} <= {file.name for file in folder.iterdir()}
    executed = nbformat.read(done, as_version=4).cells
    live = next(cell for cell in executed if "trainer.train" in cell.source)
    assert ["image/png" in output.get("data", {}) for output in live.outputs].count(True) == 1  # redrawn in place
