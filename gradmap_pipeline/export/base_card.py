"""What the model card of a base model says that holds for models made from it: licence and language."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..checkpoint.files import check_inside
from ..errors import ModelError, RecipeError
from ..recipe.yaml_positions import load_yaml

CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of the metadata block: https://huggingface.co/docs/hub/model-cards#model-card-metadata"""
_LONGEST_BYTES = 2**16
_BLOCK = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.MULTILINE | re.DOTALL)
_PLAIN = re.compile(r"[A-Za-z][\w.-]*")
_READ_AS_OTHERS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


def carried_metadata(folder: Path) -> list[str]:
    """Lines of YAML with the licence and the languages that the card in a base model's folder names; none where it names none.

    A metadata block that is no YAML, or over 64 KiB, names none.
    """
    fields = _read_block(folder / "README.md")
    lines = []
    for name in CARRIED:
        values = fields.get(name)
        texts = [value for value in (values if isinstance(values, list) else [values]) if isinstance(value, str) and value]
        if texts:
            lines.append(f"{name}: {_quote(texts[0]) if isinstance(values, str) else '[' + ', '.join(map(_quote, texts)) + ']'}")
    return lines


def _read_block(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        check_inside(card.parent, card)
        with card.open("rb") as file:
            match = _BLOCK.match(file.read(_LONGEST_BYTES).decode("utf-8", errors="replace"))
        data = load_yaml(match[1], card.name).data if match else None
    except (ModelError, RecipeError, OSError):
        return {}
    return data if isinstance(data, dict) else {}


def _quote(text: str) -> str:
    """A YAML scalar that is this text under YAML 1.1 too, where `no` is a truth value."""
    return text if _PLAIN.fullmatch(text) and text.casefold() not in _READ_AS_OTHERS else json.dumps(text)
