"""Strict parameters: one-line errors that name the field, and agreement with the notebook."""

from typing import ClassVar, Literal

import nbformat
import pytest
from pydantic import model_validator

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
    ],
)
def test_bad_values_are_named_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ParamsError, match=f"93_strict.yaml: {message}") as error:
        load(path)
    assert "\n" not in str(error.value)


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
