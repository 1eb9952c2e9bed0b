"""Typed parameters of the figures.

One YAML file per figure and tier, ``params/<tier>/<figure>.yaml``, holds flat keys: the parameters of the figure's
notebook. A subclass of :class:`FigureParams` is their schema and turns them into specs. Bad input ends in
:class:`ParamsError`, one line that names the file, the field and what is allowed.
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.table import Table

from rlhfscale.runs.paths import current_tier, project_root
from rlhfscale.runs.spec import Spec
from rlhfscale.study.strict_yaml import YamlError, read

Role = Literal["scientific", "nuisance", "fixed"]

FIGURES: dict[str, type["FigureParams"]] = {}
"""The schema of each figure, by figure name; filled as subclasses are defined."""


class ParamsError(ValueError):
    """Parameters that do not fit; one line that names the field and the allowed values."""


def field(default: Any = ..., *, role: Role, doc: str, **constraints: Any) -> Any:
    """A documented parameter; ``constraints`` are pydantic's (``ge``, ``le``, ``min_length``, ...).

    role: ``scientific`` (what the figure varies or measures), ``nuisance`` (must be set well for the comparison to be
    fair) or ``fixed`` (held the same throughout).
    """
    if role not in get_args(Role):
        raise TypeError(f"role is {role!r}; allowed: {', '.join(get_args(Role))}")
    return Field(default, description=doc, json_schema_extra={"role": role}, **constraints)


class FigureParams(BaseModel):
    """Base of every figure's parameters: frozen, typed strictly, unknown keys are errors, lists become tuples.

    Class attributes:
        figure: name of the figure, its notebook and its YAML file, such as ``01_policy_size``.
        title: one line for plans and reports.
        claims: identifiers of the claims that it tests.
        reads_results: it is made from other figures' results, so after them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    figure: ClassVar[str]
    title: ClassVar[str]
    claims: ClassVar[tuple[str, ...]] = ()
    reads_results: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name, info in cls.model_fields.items():
            if not info.description or not isinstance(info.json_schema_extra, dict):
                raise TypeError(f"{cls.__name__}.{name} must be made with params.field(role=..., doc=...)")
        if "figure" in cls.__dict__:
            FIGURES[cls.figure] = cls

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: Any) -> Any:
        return {name: _tuples(value) for name, value in values.items()} if isinstance(values, dict) else values

    @classmethod
    def parse(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Validate values; ParamsError in one line, prefixed with ``source``, where they do not fit."""
        try:
            return cls(**values)
        except ValidationError as error:
            message = "; ".join(explain(problem, list(cls.model_fields)) for problem in error.errors())
            raise ParamsError(f"{source}: {message}" if source else message) from None

    @classmethod
    def of(cls, namespace: Mapping[str, Any]) -> Self:
        """The parameters that a notebook's parameters cell has assigned: ``P = Params.of(globals())``.

        A name that was assigned beside them, by papermill's ``-p`` or by hand, and that is no parameter is refused: it
        would change nothing, and nobody would notice.

        Raises ParamsError: such a name; a parameter that is missing or does not fit.
        """
        for name in assigned_names(namespace.get("In", ()), set(cls.model_fields)):
            if name not in cls.model_fields:
                raise ParamsError(_unknown(name, list(cls.model_fields)))
        return cls.parse({name: namespace[name] for name in cls.model_fields if name in namespace})

    def specs(self) -> tuple[Spec, ...]:
        """The specs whose artifacts the figure is made from (their ancestors need not be listed)."""
        raise NotImplementedError(f"{type(self).__name__} has no specs()")

    def resolved(self) -> dict[str, Any]:
        """All parameters as JSON values, in field order; saved with the results."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of a SHA-256 over the resolved parameters."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:16]

    def describe(self) -> Table:
        """A table of the parameters with value, role and meaning; notebooks and terminals show it."""
        table = Table("parameter", "value", "role", "meaning", title=f"{self.figure}: {self.title}")
        for name, info in type(self).model_fields.items():
            table.add_row(name, str(self.resolved()[name]), info.json_schema_extra["role"], info.description)
        return table


def load(path_or_figure: str | Path, tier: str | None = None) -> FigureParams:
    """The validated parameters of a figure, from a YAML file or by the figure's name and tier (default: current).

    A file may name one base file with ``extends: ../base.yaml``, which may not extend another. (Papermill does not know
    ``extends``: a file that is to be given to papermill directly must hold all its keys itself.)
    Raises ParamsError where the file is missing, is no flat YAML mapping or does not fit the figure's schema.
    """
    path = Path(path_or_figure)
    if path.suffix != ".yaml":
        path = project_root() / "params" / (tier or current_tier()) / f"{path_or_figure}.yaml"
    schema = FIGURES.get(path.stem)
    if schema is None:
        raise ParamsError(f"{_short(path)}: unknown figure {path.stem}; allowed: {', '.join(sorted(FIGURES))}")
    values = read_yaml(path)
    if "extends" in values:
        base_path = path.parent / str(values.pop("extends"))
        base = read_yaml(base_path)
        if "extends" in base:
            raise ParamsError(f"{_short(base_path)}: extends: a file that others extend may not extend another")
        values = base | values
    return schema.parse(values, source=_short(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping of plain values. Raises ParamsError, see `strict_yaml.read`."""
    try:
        return read(path)
    except YamlError as error:
        raise ParamsError(f"{_short(path)}: {error}") from None


def assigned_names(cells: Sequence[str], parameters: set[str]) -> list[str]:
    """Names that a notebook's parameters cell and papermill's own cell assign, among the sources of executed cells.

    The parameters cell is the cell of nothing but constants that assigns most of the parameters; where it was run
    several times, the last counts. Papermill's cell opens with ``# Parameters``.
    """
    own, injected = [], []
    for source in cells:
        try:
            targets = [_constant_target(statement) for statement in ast.parse(source).body]
        except SyntaxError:  # a magic, such as %time
            continue
        if source.lstrip().startswith("# Parameters"):
            injected = targets
        elif all(targets) and len(parameters.intersection(targets)) >= max(1, len(parameters.intersection(own))):
            own = targets
    return [name for name in (*own, *injected) if name]


def _constant_target(statement: ast.stmt) -> str:
    """The name that a statement such as ``seeds = [1, 2]`` assigns; empty for any other statement."""
    if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
        return ""
    return statement.targets[0].id if _is_constant(statement.value) else ""


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def check_notebook_parameters(notebook: str | Path, params: FigureParams) -> None:
    """Raise ParamsError unless the notebook's ``parameters`` cell has exactly the figure's parameters.

    Papermill only warns of an unknown parameter and runs with the notebook's default. For a parameter that was not
    given (so that the schema's default applies) the notebook's default must be the same, or a plain papermill run would
    differ.
    """
    notebook = Path(notebook)
    if not notebook.is_file():
        raise ParamsError(f"{_short(notebook)}: no such notebook")
    try:
        cell = _parameters_cell(notebook)
    except (ValueError, LookupError, TypeError, SyntaxError) as error:
        raise ParamsError(f"{_short(notebook)}: not a readable notebook: {type(error).__name__}: {error}") from None
    names = params.resolved().keys()
    if not cell and names:
        raise ParamsError(f"{_short(notebook)}: has no parameters in a cell tagged 'parameters'")
    for name in cell:
        if name not in names:
            raise ParamsError(f"{_short(notebook)}: {_unknown(name, list(names))}")
    for name, value in params.resolved().items():
        if name not in cell:
            raise ParamsError(f"{_short(notebook)}: {name}: missing from the parameters cell")
        if name not in params.model_fields_set and not _same(cell[name], value):
            default = cell[name]
            raise ParamsError(f"{_short(notebook)}: {name}: default {default} differs from the schema's {value!r}")


def _parameters_cell(notebook: Path) -> dict[str, str]:
    """The names that the cell tagged ``parameters`` assigns, and the source of their values; none without such a cell.

    papermill.inspect_notebook would do, but takes seconds to import.
    """
    cells = json.loads(notebook.read_text())["cells"]
    tagged = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    statements = ast.parse("".join(tagged[0])).body if tagged else []
    return {
        target.id: ast.unparse(statement.value)
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def explain(problem: dict[str, Any], allowed: list[str]) -> str:
    """One of pydantic's errors (an entry of ``ValidationError.errors()``) in the words of a YAML file."""
    name = ".".join(map(str, problem["loc"])) or "parameters"
    given, kind, context = problem["input"], problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden" and len(problem["loc"]) == 1:
        return _unknown(name, allowed)
    if kind == "missing":
        return f"{name}: missing"
    if kind == "too_short":
        least = context["min_length"]
        return f"{name}: list must not be empty" if least == 1 else f"{name}: needs at least {least} values"
    if kind in ("value_error", "assertion_error"):
        return f"{name}: {context['error']}" if problem["loc"] else str(context["error"])
    if kind == "literal_error":
        return f"{name}: {given!r} is not allowed; allowed: {context['expected'].replace(' or ', ', ')}"
    hint = ""
    if kind == "float_type" and isinstance(given, str) and _is_number(given):
        hint = f"; YAML reads {given} as text: write it with a point, such as 1.0e-4"
    return f"{name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {given!r}{hint}"


def _unknown(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    return f"{name}: unknown parameter{guess}; allowed: {', '.join(allowed)}"


def _tuples(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _same(source: str, value: Any) -> bool:
    try:
        return _tuples(ast.literal_eval(source)) == _tuples(value)
    except (ValueError, SyntaxError):
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(path: Path) -> str:
    """The path relative to the project's root where it lies below it."""
    try:
        return str(path.resolve().relative_to(project_root().resolve()))
    except (ValueError, FileNotFoundError):
        return str(path)
