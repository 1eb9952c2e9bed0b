"""A reader of parameter files that takes plain values only: numbers, text, true, false, null, lists, mappings.

What YAML has beside these is refused by line: anchors and aliases (which make small files huge), tags, merge keys, a
second document, names that are not text, names given twice, deep nesting. A date stays text.
"""

from pathlib import Path
from typing import Any, ClassVar

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_VALUE = 1000
"""Characters of a value."""


class YamlError(ValueError):
    """A file that is no plain mapping, in one line."""


DATES_AND_MERGES = {f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "merge", "value")}


class _Loader(yaml.SafeLoader):
    """SafeLoader without the types that no parameter has, and with the line of a value that cannot be built."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in DATES_AND_MERGES]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Refuse what is not plain as it is parsed: nothing is built yet. ``index`` is None for a mapping's name."""
        event = self.peek_event()
        _check_event(event, self.depth)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(parent, yaml.MappingNode) and index is None:
            _check_name(node, parent, _line(event))
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_node() if self.check_node() else None
        if self.check_node():
            raise YamlError(f"{_line(self.peek_event())}: a second document is not allowed")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise YamlError(f"{_line(node)}: {node.value!r} is not a value: {error}") from None


def read(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; an empty file is an empty mapping.

    Raises:
        YamlError: the file cannot be read, is too large, or is no mapping of plain values; says what and on which line.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise YamlError(f"{path.stat().st_size} bytes; a parameter file has at most {MAX_BYTES}")
        values = yaml.load(content.decode(), Loader=_Loader)
    except FileNotFoundError:
        raise YamlError("no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(f"not readable: {error}") from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    if values is not None and not isinstance(values, dict):
        raise YamlError("must hold parameter: value lines")
    return values or {}


def _line(place: yaml.Event | yaml.Node) -> str:
    return f"line {place.start_mark.line + 1}"


def _check_event(event: yaml.Event, depth: int) -> None:
    line = _line(event)
    if isinstance(event, yaml.AliasEvent):
        raise YamlError(f"{line}: an alias (*{event.anchor}) is not allowed")
    if event.anchor:
        raise YamlError(f"{line}: an anchor (&{event.anchor}) is not allowed")
    if event.tag:
        raise YamlError(f"{line}: a tag ({event.tag.replace('tag:yaml.org,2002:', '!!')}) is not allowed")
    if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE:
        raise YamlError(f"{line}: a value of {len(event.value)} characters; at most {MAX_VALUE} are allowed")
    if isinstance(event, yaml.CollectionStartEvent) and depth >= MAX_DEPTH:
        raise YamlError(f"{line}: values nested more than {MAX_DEPTH} deep are not allowed")


def _check_name(name: yaml.Node, mapping: yaml.MappingNode, line: str) -> None:
    if name.tag != "tag:yaml.org,2002:str":
        raise YamlError(f"{line}: a name must be plain text")
    if name.value in {other.value for other, _ in mapping.value}:
        raise YamlError(f"{name.value}: given twice, the second time on {line}")
