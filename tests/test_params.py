"""Strict parameters: one-line errors that name the field, and agreement with the notebook."""

import os
import random
import subprocess
import sys
from typing import ClassVar, Literal

import nbformat
import pytest
from pydantic import model_validator

from rlhfscale.runs.paths import project_root
from rlhfscale.study import params
from rlhfscale.study.params import FIGURES, FigureParams, ParamsError, check_notebook_parameters, field, load
from toy_stages import ToyParams


class Strict(FigureParams):
    figure: ClassVar[str] = "93_strict"
    title: ClassVar[str] = "strict"

    seeds: tuple[int, ...] = field((0,), role="scientific", doc="seeds", min_length=1)
    num_prompts: int = field(8, role="fixed", doc="prompts", ge=1)
    lr: float = field(0.1, role="nuisance", doc="learning rate", gt=0)
    algorithm: Literal["ppo", "grpo"] = field("ppo", role="scientific", doc="algorithm")
    pairs: tuple[tuple[int, str], ...] = field(((1, "a"),), role="fixed", doc="nested lists")

    @model_validator(mode="after")
    def _seeds_fit(self):
        if len(self.seeds) > self.num_prompts:
            raise ValueError("seeds: at most num_prompts of them")
        return self


def write(tmp_path, text, name="93_strict.yaml"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_promts: 3", r"num_promts: unknown parameter \(did you mean num_prompts\?\); allowed: seeds, num_prompts"),
        ("seeds: []", "seeds: list must not be empty"),
        ('num_prompts: "3"', "num_prompts: input should be a valid integer, not '3'"),
        ("num_prompts: 2.5", "num_prompts: .*integer.*2.5"),
        ("num_prompts: true", "num_prompts: .*integer.*True"),
        ("num_prompts: 0", "num_prompts: .*greater than or equal to 1, not 0"),
        ("seeds: [1, x]", "seeds.1: .*integer.*'x'"),
        ("seeds: 3", "seeds: .*not 3"),
        ("lr: 1e-4", "lr: .*'1e-4'; YAML reads 1e-4 as text: write it with a point"),
        ("lr: .nan", "lr: .*finite"),
        ("lr: '0.1'", "lr: .*number"),
        ("algorithm: dpo", "algorithm: 'dpo' is not allowed; allowed: 'ppo', 'grpo'"),
        ("num_prompts: 1\nseeds: [1, 2]", "seeds: at most num_prompts"),
        ("lr: 0.1\nlr: 0.2", "lr: given twice"),
        ("- 1", "must hold parameter: value lines"),
        ("lr: [", "while parsing"),
        ("a: &a [1, 1]\nb: *a", "line 1: an anchor .&a. is not allowed"),
        ("seeds: *a", "line 1: an alias .*a. is not allowed"),
        ("seeds: !!python/name:os.system x", "line 1: a tag .* is not allowed"),
        ("lr: !!float x", "line 1: a tag .!!float. is not allowed"),
        ("lr: 0.1\nseeds: " + "[" * 2000, "line 2: .*nested more than 16 deep"),
        ("seeds: [" + "1" * 5000 + "]", "line 1: a value of 5000 characters; at most 1000 are allowed"),
        ("? [1, 2]\n: 1", "line 1: a name must be plain text"),
        ("{{a: 1}: 2}", "line 1: a name must be plain text"),
        ("{a: 1}: 2", "line 1: a name must be plain text"),
        ("seeds: 2026-13-45", "seeds: .*not '2026-13-45'"),
        ("seeds: 2026-01-05", "seeds: .*not '2026-01-05'"),
        ("lr: 0.1\n---\nlr: 0.2", "line 2: a second document"),
        ("lr: 0x_", "line 1: '0x_' is not a value"),
        ("seeds: \x00", "not readable|not allowed"),
        ("<<: {lr: 0.1}", "<<: unknown parameter"),
        ("1: 2", "line 1: a name must be plain text"),
        ("lr: 0.1 # " + "x" * 2_000_000, "2000010 bytes; a parameter file has at most 1000000"),
    ],
)
def test_bad_values_are_named_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ParamsError, match=f"93_strict.yaml: {message}") as error:
        load(path)
    assert "\n" not in str(error.value)


def refusal(path) -> str | None:
    try:
        load(path)
    except ParamsError as error:
        return str(error)
    return None


def test_no_text_makes_the_loader_fail_otherwise(tmp_path):
    """Texts put together at random from what YAML gives a meaning: each is read, or refused in one line."""
    rng = random.Random(17)
    pieces = [
        *(
            "seeds",
            "lr",
            "num_prompts",
            ": ",
            ":",
            " ",
            "\n",
            "\n  ",
            "\t",
            "- ",
            "[",
            "]",
            "{",
            "}",
            ",",
            "? ",
            "&a ",
            "*a",
        ),
        *(
            "!!int ",
            "!x ",
            "!!python/object:os.x ",
            "|",
            ">-",
            "'",
            '"',
            "\\",
            "#",
            "%YAML 1.2",
            "---",
            "...",
            "<<",
            "@",
            "`",
        ),
        *(
            "1",
            "1e-4",
            "-0",
            ".inf",
            "0o7",
            "0b",
            "1_000",
            "12:30:45",
            "2026-02-30",
            "~",
            "yes",
            "null",
            "\u2028",
            "\ufeff",
            "é",
        ),
    ]
    for _ in range(300):
        path = write(tmp_path, "".join(rng.choices(pieces, k=rng.randint(1, 14))))
        said = refusal(path)
        assert said is None or (said.startswith(f"{path}: ") and "\n" not in said)


def test_good_values_are_read_and_lists_become_tuples(tmp_path):
    read = load(write(tmp_path, "seeds: [3, 4]\nlr: 1.0e-4\npairs: [[1, b]]"))
    assert read.seeds == (3, 4) and read.lr == 1e-4 and read.pairs == ((1, "b"),)
    assert read == Strict(seeds=[3, 4], lr=1e-4, pairs=[[1, "b"]])
    assert list(read.resolved()) == ["seeds", "num_prompts", "lr", "algorithm", "pairs"]
    assert read.hash == Strict(seeds=(3, 4), lr=1e-4, pairs=((1, "b"),)).hash != Strict().hash


def test_one_level_of_inheritance(tmp_path):
    write(tmp_path, "seeds: [7]\nlr: 0.5", "base.yaml")
    read = load(write(tmp_path, "extends: ../base.yaml\nlr: 0.25", "tier/93_strict.yaml"))
    assert read.seeds == (7,) and read.lr == 0.25
    write(tmp_path, "extends: other.yaml", "base.yaml")
    with pytest.raises(ParamsError, match="base.yaml: extends: .*may not extend another"):
        load(tmp_path / "tier" / "93_strict.yaml")


def test_unknown_figure_and_missing_file(tmp_path):
    with pytest.raises(ParamsError, match="unknown figure 94_none; allowed: .*93_strict"):
        load(tmp_path / "94_none.yaml")
    with pytest.raises(ParamsError, match="no such file"):
        load("93_strict", tier="nowhere")


def test_registry_and_description():
    assert FIGURES["93_strict"] is Strict
    table = Strict().describe()
    assert list(table.columns[2].cells) == ["scientific", "fixed", "nuisance", "scientific", "fixed"]
    with pytest.raises(TypeError, match="lr must be made with params.field"):

        class Undocumented(FigureParams):
            lr: float = 0.1

    with pytest.raises(TypeError, match="role is 'odd'"):
        field(1, role="odd", doc="")


def notebook(tmp_path, source, tags=("parameters",)):
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}
    )
    book.cells = [nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})]
    nbformat.write(book, tmp_path / "n.ipynb")
    return tmp_path / "n.ipynb"


CELL = 'seeds = [1, 2]\nbest_of = 4  # samples\nlr = 0.1\nmood = ""'


def test_the_notebooks_cell_must_have_the_same_parameters(tmp_path):
    given = ToyParams(seeds=(9,))
    check_notebook_parameters(notebook(tmp_path, CELL), given)
    for source, message in [
        (CELL + "\nextra = 1", "extra: unknown parameter; allowed: seeds, best_of, lr, mood"),
        (CELL.replace("lr = 0.1\n", ""), "lr: missing from the parameters cell"),
        (CELL.replace("0.1", "0.3"), "lr: default 0.3 differs from the schema's 0.1"),
    ]:
        with pytest.raises(ParamsError, match=f"n.ipynb: {message}"):
            check_notebook_parameters(notebook(tmp_path, source), given)
    with pytest.raises(ParamsError, match="no parameters in a cell"):
        check_notebook_parameters(notebook(tmp_path, CELL, tags=()), given)
    with pytest.raises(ParamsError, match="no such notebook"):
        check_notebook_parameters(tmp_path / "none.ipynb", given)
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(ParamsError, match="not a readable notebook"):
        check_notebook_parameters(tmp_path / "broken.ipynb", given)


def test_a_given_value_may_differ_from_the_notebooks_default(tmp_path):
    check_notebook_parameters(notebook(tmp_path, CELL.replace("0.1", "0.3")), ToyParams(lr=0.7))


def test_a_figure_without_specs_says_so():
    with pytest.raises(NotImplementedError, match="Strict has no specs"):
        Strict().specs()


def test_parse_prefixes_the_source():
    with pytest.raises(params.ParamsError, match="^cell 3: lr: "):
        Strict.parse({"lr": "x"}, source="cell 3")


CELL_OF_STRICT = "seeds = [0, 1]\nnum_prompts = 8\nlr = 0.1\nalgorithm = 'ppo'\npairs = [[1, 'a']]"


def namespace(*cells: str, **more) -> dict:
    """What a notebook's ``globals()`` holds after these cells: what they assign, and their sources in ``In``."""
    found: dict = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, found)
    return found | more


def test_a_notebook_has_its_parameters_from_the_cell_alone():
    found = Strict.of(
        namespace("import math\nwidth = math.pi", CELL_OF_STRICT, "# Parameters\nnum_prompts = 4", "unrelated = 1")
    )
    assert found == Strict(seeds=(0, 1), num_prompts=4, lr=0.1, algorithm="ppo", pairs=((1, "a"),))


@pytest.mark.parametrize(
    "cells", [(CELL_OF_STRICT, "# Parameters\nnum_promts = 4"), (CELL_OF_STRICT + "\nnum_promts = 4",)]
)
def test_a_misspelt_parameter_is_refused_in_the_notebook(cells):
    with pytest.raises(
        ParamsError, match=r"num_promts: unknown parameter \(did you mean num_prompts\?\); allowed: seeds"
    ):
        Strict.of(namespace(*cells))


def test_a_cell_that_was_mended_and_run_again_counts():
    found = namespace(CELL_OF_STRICT + "\nnum_promts = 4", CELL_OF_STRICT)
    assert Strict.of(found).num_prompts == 8


def test_a_notebook_without_a_value_that_fits_is_refused():
    with pytest.raises(ParamsError, match="lr: .*greater than 0"):
        Strict.of(namespace(CELL_OF_STRICT.replace("0.1", "-0.1")))


@pytest.mark.slow
def test_papermill_itself_is_told_of_a_misspelt_parameter(tmp_path):
    """``papermill -p`` only warns; the notebook stops before anything is made."""
    notebook = project_root() / "notebooks" / "06_best_of_n.ipynb"
    command = [sys.executable, "-m", "papermill", notebook, tmp_path / "out.ipynb", "-p", "num_sample", "8"]
    environment = os.environ | {"RLHFSCALE_TIER": "smoke", "RLHFSCALE_STORE": str(tmp_path / "store")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode and "num_sample: unknown parameter (did you mean num_samples?)" in done.stderr
    assert not (tmp_path / "store").exists()
