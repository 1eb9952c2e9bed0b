"""The base of every spec: a frozen, typed record that says what an artifact is made from.

A spec's fields are plain values or other specs; the specs among them are its parents. Its key is a hash of the stage's
name and version, of every field, and of the parents' keys: two notebooks that describe the same artifact share it, and
a change of anything that alters the artifact gives it another key. This module imports neither torch nor a model.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

Inputs = Mapping[str, Path]
"""What a stage's function is given of its parents: the artifact folder of each by its key."""


class Needs(BaseModel):
    """What a node is made on.

    Attributes:
        gpus: in all; more than one are as many processes, see `team`.
        machines: that these GPUs are in, as many in each.
        cpus, memory_mib: cores and MiB of memory of each machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpus: float = 1.0
    gpus: int = 0
    machines: int = 1
    memory_mib: int = 1024


class Spec(BaseModel):
    """A node of the graph. Subclasses are the stages' specs (see :mod:`rlhfscale.bed.specs`).

    Class attributes:
        stage: name of the stage, part of the key and of the artifact's folder.
        version: raised by hand whenever the stage's code changes what it produces (a test guards this).
        runner: ``"module:function"``, called as ``function(spec, inputs, folder)`` in a worker process, where
            ``inputs`` maps the key of each parent to its verified artifact folder and ``folder`` is an empty
            temporary folder that becomes the artifact.
        added: fields that came when artifacts had been made already: they are no part of the key while they have their
            default, so that those artifacts keep theirs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: ClassVar[str]
    version: ClassVar[int] = 1
    runner: ClassVar[str]
    added: ClassVar[tuple[str, ...]] = ()

    @cached_property
    def parents(self) -> tuple["Spec", ...]:
        """The specs among the fields, also inside tuples, in field order, then `also_read`; without repetition."""
        found: dict[str, Spec] = {}
        for value in (*(getattr(self, name) for name in type(self).model_fields), self.also_read):
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Spec):
                    found.setdefault(item.key, item)
        return tuple(found.values())

    @property
    def also_read(self) -> tuple["Spec", ...]:
        """Ancestors whose artifacts the stage reads although no field names them, such as a parent's base."""
        return ()

    @cached_property
    def key(self) -> str:
        """``stage-`` and 16 hexadecimal digits of a SHA-256 over stage, version, fields and parents' keys."""
        return key_of(self.describe())

    def describe(self) -> dict[str, Any]:
        """The fields as JSON values with each parent replaced by its key; saved in the artifact's manifest."""
        infos = type(self).model_fields.items()
        told = [name for name, info in infos if name not in self.added or getattr(self, name) != info.default]
        fields = {name: _plain(getattr(self, name)) for name in told}
        return {"stage": self.stage, "version": self.version, "fields": fields}

    def changed(self, **fields: Any) -> Self:
        """The spec with other fields, checked anew. (`model_copy` checks nothing, and keeps a key that was read.)"""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | fields)

    @property
    def cost_s(self) -> float:
        """Estimated seconds on one CPU thread, for plans and progress bars only."""
        return 1.0

    @property
    def needs(self) -> "Needs":
        """What a cluster must set aside for it."""
        return Needs()

    @property
    def title(self) -> str:
        """A short line for progress bars and error reports."""
        return self.key

    def walk(self) -> Iterator["Spec"]:
        """Every ancestor, parents first, then the spec itself; each once."""
        seen: set[str] = set()

        def visit(spec: "Spec") -> Iterator["Spec"]:
            if spec.key in seen:
                return
            seen.add(spec.key)
            for parent in spec.parents:
                yield from visit(parent)
            yield spec

        yield from visit(self)


def key_of(description: dict[str, Any]) -> str:
    """The key of the spec that `Spec.describe` gave, also after a way through JSON."""
    text = json.dumps(description, sort_keys=True, allow_nan=False)
    return f"{description['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.key
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value
