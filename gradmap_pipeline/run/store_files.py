"""Files of the store: JSON that says whether it is what was written, and what has a name of the store's and is something else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..machine.digests import sha256_of_value

DIGEST = "sha256"
"""Key under which a JSON file of the store has the digest of all that it holds besides."""


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the digest of all that it holds."""
    return {**content, DIGEST: sha256_of_value(content)}


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the store; empty when there is none, or when it is not what was written."""
    if not file.is_file():  # a pipe would be waited for
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        content = {name: part for name, part in value.items() if name != DIGEST}
        return content if value[DIGEST] == sha256_of_value(content) else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}


def is_own_file(path: Path) -> bool:
    """Whether a path is a file itself, and no link to one."""
    return path.is_file() and not path.is_symlink()


def remove_unless(is_right: Callable[[Path], bool], path: Path) -> None:
    """Clear away what has a name of the store's and is something else, or a link to something else."""
    if os.path.lexists(path) and not is_right(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
