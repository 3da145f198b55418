"""The recipes that ship: their names, what they do, and their text."""

from __future__ import annotations

from importlib.resources import files

from ..errors import CommandError
from .validation import suggest

_PACKAGE = "gradmap_recipes"
_ENDING = ".yaml"


def list_recipes() -> str:
    """A line for each: its name, and the first line of its comment."""
    texts = _read_all()
    width = max(map(len, texts), default=0)
    return "\n".join(f"{name:<{width}}  {text.splitlines()[0].lstrip('# ')}" for name, text in texts.items())


def read_recipe(name: str) -> str:
    """The text of one, by its name with or without ending. Raises `CommandError` where there is none."""
    texts = _read_all()
    stem = name.removesuffix(_ENDING)
    if stem not in texts:
        raise CommandError(f"no recipe named {name!r} ships; {suggest(stem, texts)}")
    return texts[stem]


def _read_all() -> dict[str, str]:
    recipes = [file for file in files(_PACKAGE).iterdir() if file.name.endswith(_ENDING)]
    return {
        file.name.removesuffix(_ENDING): file.read_text(encoding="utf-8") for file in sorted(recipes, key=lambda file: file.name)
    }
