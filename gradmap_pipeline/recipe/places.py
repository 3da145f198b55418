"""Places that no step may write to: the store, the current folder, and whatever the recipe reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..errors import GradmapError
from ..stages.stage import Stage

if TYPE_CHECKING:
    from ..checkpoint.source import ModelSource

DEFAULT_STORE = Path(".gradmap")
"""Folder for results, where the command line names no other."""


@dataclass(frozen=True)
class Place:
    """A file or folder that must stay as it is."""

    path: Path
    name: str
    """A name for messages: `the store`."""
    holds_outputs: bool = False
    """Whether steps may write inside it, as into the current folder."""

    def find_relation(self, target: Path) -> str | None:
        """How writing `target`, an absolute path, would change it: `is`, `holds` or `lies in`; None where it would not."""
        mine = self.path.resolve()
        if target == mine:
            return "is"
        if mine.is_relative_to(target):
            return "holds"
        return "lies in" if target.is_relative_to(mine) and not self.holds_outputs else None


def find_machine_places(store: Path, recipe: Path, plugins: Sequence[Path] = ()) -> list[Place]:
    """Places that are taken whatever the recipe says."""
    return [
        Place(store, "the store"),
        Place(Path.cwd(), "the current folder", holds_outputs=True),
        Place(Path.home(), "the home folder", holds_outputs=True),
        Place(recipe, "the recipe"),
        Place(Path(sys.prefix), "Python"),
        Place(Path(__file__).parent.parent, "gradmap-pipeline"),
        *(Place(plugin, f"the plugin {str(plugin)!r}") for plugin in plugins),
    ]


def find_model_places(model: ModelSource | None) -> Iterator[Place]:
    """The folder of the recipe's model, if it is on this machine."""
    try:
        folder = None if model is None else model.find_folder()
    except (GradmapError, OSError, ValueError):  # told elsewhere
        return
    if folder is not None:
        yield Place(folder, "the model")


def find_read_places(stage: Stage, step: str, writes: Sequence[Path]) -> Iterator[Place]:
    """Files and folders that the options of a step name, but those that it writes."""
    written = {path.resolve() for path in writes}
    for option in type(stage).model_fields:
        for path in _paths_in(vars(stage)[option]):
            if path.exists() and path.resolve() not in written:
                yield Place(path, f"{str(path)!r}, which step {step!r} reads")


def _paths_in(value: Any) -> Iterator[Path]:
    if hasattr(value, "local_paths"):
        yield from value.local_paths()
    elif isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _paths_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _paths_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _paths_in(item)
