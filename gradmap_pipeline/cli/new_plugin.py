"""`gradmap new-plugin`: an installable package with one working stage, its tests and a recipe, from `template/`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..errors import CommandError
from ..machine.atomic_folder import atomic_folder, replace_folder
from ..machine.shortages import is_shortage
from ..recipe.catalog import load_catalog
from ..recipe.validation import suggest

KINDS = ("ranking", "transform", "correction", "exporter", "evaluation", "quantiser")
_TEMPLATE = Path(__file__).parent.parent / "template"
_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
"""https://packaging.python.org/en/latest/specifications/name-normalization/"""
_STAGE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")
_LONGEST = 60
"""Characters of a name."""
_PREFIX = "gradmap_"
"""Distributions have this prefix, their stages do not: gradmap-keep-ends has the stage keep_ends."""


def write_plugin(name: str, kind: str, to: Path | None) -> tuple[Path, str]:
    """Write a package; return its folder and the name of its stage. Raises `CommandError`, and writes nothing then."""
    if kind not in KINDS:
        raise CommandError(f"--kind: found {kind!r}; {suggest(kind, KINDS)}")
    stage = _name_stage(name)
    folder = Path(name) if to is None else to
    _check_folder(folder)
    names = {"stage_name": stage, "StageName": "".join(map(str.capitalize, stage.split("_"))), "distribution-name": name}
    try:
        with atomic_folder(folder.absolute()) as draft:
            for part in ("common", kind):
                for place, text in _walk(_TEMPLATE / part):
                    file = draft / _replace(place, names)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(_replace(text, names), encoding="utf-8")
            replace_folder(draft, folder.absolute())
    except OSError as error:
        if is_shortage(error):
            raise
        raise CommandError(
            f"{str(folder)!r} cannot be written: {error.strerror or error}; name another folder with --to"
        ) from error
    return folder, stage


def _name_stage(name: str) -> str:
    """The stage's name, from that of the distribution."""
    if not _DISTRIBUTION.fullmatch(name) or len(name) > _LONGEST:
        raise CommandError(
            f"NAME: found {name[: 2 * _LONGEST]!r}; accepted: up to {_LONGEST} letters, digits, '-', '_' and '.', with a letter or "
            "digit at both ends, as gradmap-drop-layers"
        )
    stage = re.sub(r"[-_.]+", "_", name).lower().removeprefix(_PREFIX)
    if not _STAGE.fullmatch(stage):
        raise CommandError(
            f"NAME: found {name!r}; a stage is named by two words or more, the first of which begins with a letter, as drop-layers "
            "or gradmap-drop-layers"
        )
    plugin = load_catalog().plugin_of.get(stage)
    if plugin is not None:
        raise CommandError(f"NAME: there is a stage {stage!r} already, of {plugin!r}; choose another name")
    existing = find_spec(stage)
    if existing is not None and existing.origin is not None:
        raise CommandError(f"NAME: there is a module {stage!r} already, in {existing.origin!r}; choose another name")
    return stage


def _check_folder(folder: Path) -> None:
    """Raise `CommandError` unless a folder is new or empty, in a place that can be written."""
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
        raise CommandError(f"{str(folder)!r} is not a folder; name a new one with --to")
    if folder.resolve() == Path.cwd().resolve():
        raise CommandError(f"{str(folder)!r} is the current folder; name a new one with --to")
    if folder.is_dir() and any(folder.iterdir()):
        raise CommandError(f"folder {str(folder)!r} is not empty; name a new one with --to")


def _walk(folder: Path) -> Iterator[tuple[str, str]]:
    """All files of a template: where in it, and their text."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.parent.name != "__pycache__":  # installing compiles what it takes for modules
            yield file.relative_to(folder).as_posix(), file.read_text(encoding="utf-8")


def _replace(text: str, names: dict[str, str]) -> str:
    return re.sub("|".join(names), lambda word: names[word[0]], text)
