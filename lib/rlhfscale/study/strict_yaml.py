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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise YamlError(f"line {node.start_mark.line + 1}: {node.value!r} is not a value: {error}") from None


_RESOLVER = _Loader("")


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
        text = content.decode()
        _check(text)
        values = yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise YamlError("no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise YamlError(f"not readable: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, YamlError):
            raise
        raise YamlError(" ".join(str(error).split())) from None
    if values is not None and not isinstance(values, dict):
        raise YamlError("must hold parameter: value lines")
    return values or {}


def _check(text: str) -> None:
    """Refuse what is not plain, from the events of the parser: nothing is built yet."""
    open_: list[set[str] | None] = []
    """For each collection that is open: the names of a mapping, or None for a list."""
    awaits_name: list[bool] = []
    documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise YamlError(f"{line}: a second document is not allowed")
        if isinstance(event, yaml.CollectionEndEvent):
            open_.pop(), awaits_name.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        _check_node(event, line)
        if open_ and open_[-1] is not None:
            if awaits_name[-1]:
                _check_name(event, line, open_[-1])
            awaits_name[-1] = not awaits_name[-1]
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_) == MAX_DEPTH:
                raise YamlError(f"{line}: values nested more than {MAX_DEPTH} deep are not allowed")
            is_mapping = isinstance(event, yaml.MappingStartEvent)
            open_.append(set() if is_mapping else None)
            awaits_name.append(is_mapping)


def _check_node(event: yaml.NodeEvent, line: str) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise YamlError(f"{line}: an alias (*{event.anchor}) is not allowed")
    if event.anchor:
        raise YamlError(f"{line}: an anchor (&{event.anchor}) is not allowed")
    if event.tag:
        raise YamlError(f"{line}: a tag ({event.tag.replace('tag:yaml.org,2002:', '!!')}) is not allowed")
    if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_VALUE:
        raise YamlError(f"{line}: a value of {len(event.value)} characters; at most {MAX_VALUE} are allowed")


def _check_name(event: yaml.NodeEvent, line: str, names: set[str]) -> None:
    is_text = isinstance(event, yaml.ScalarEvent) and (
        not event.implicit[0] or _RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False)).endswith(":str")
    )
    if not is_text:
        raise YamlError(f"{line}: a name must be plain text")
    if event.value in names:
        raise YamlError(f"{event.value}: given twice, the second time on {line}")
    names.add(event.value)
