"""Files that are written whole or not at all, and told apart by their content."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def sealed(content: dict[str, Any]) -> bytes:
    """JSON with a hash of all else in it, by which a change shows; a seal that is there already is made anew."""
    content = {name: value for name, value in content.items() if name != "seal"}
    return plain_json(content | {"seal": hashlib.sha256(plain_json(content)).hexdigest()})
