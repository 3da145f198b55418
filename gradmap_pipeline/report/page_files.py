"""The page of an export or of a run, as a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import CommandError, StageError
from ..export.verify import read_lineage
from ..machine.atomic_folder import atomic_folder, write_file
from ..machine.shortages import is_shortage
from ..page.facts import Facts, facts_of_lineage, facts_of_run
from ..page.page import make_page
from ..page.pictures import PICTURE_START, draw_layers
from ..page.template import GENERATOR
from ..run.store import Store
from ..stages.targets import find_surrounding_export

_MARKS = {"--to": GENERATOR, "--svg": PICTURE_START}
"""What a file holds that an earlier report wrote, so that it may be replaced; by the option that names it."""
_MARKED_CHARACTERS = 2000


def read_latest(store: Path) -> tuple[Facts, str]:
    """What the latest run of a store recorded, and a line that names it. Raises `CommandError` where no run came to figures."""
    record = Store(store).load_run()
    facts = None if record is None else facts_of_run(record)
    if record is None or facts is None:
        advice = "run a recipe first, name the store with --store, or name the folder of an export"
        raise CommandError(f"the store {str(store)!r} has no finished run; {advice}")
    return facts, f"run {record['head']['id']} of {record['head']['recipe']}, ended {record['ended_at']}"


def read_facts(source: Path, store: Path) -> Facts:
    """What an export, or the latest run of a recipe, recorded. Raises `CommandError`, and `StageError` where that is damaged."""
    if source.is_dir():
        facts = facts_of_lineage(read_lineage(source))
        if facts is None:
            raise StageError(f"{str(source)!r} holds no model; name the folder of an export")
        return facts
    if not source.exists():
        raise CommandError(f"{str(source)!r} is neither a folder nor a recipe: there is no such file; name an export or a recipe")
    record = Store(store).load_run(source)
    facts = None if record is None else facts_of_run(record)
    if facts is None:
        raise CommandError(
            f"the store {str(store)!r} has no finished run of {str(source)!r}; run it with `gradmap run {source}`, or name the "
            "store with --store"
        )
    return facts


def check_files(to: Path, svg: Path | None) -> None:
    """Raise `CommandError` where a page or a picture cannot be written, or would take the place of something else."""
    if svg is not None and svg.resolve() == to.resolve():
        raise CommandError(f"--to and --svg name the same file, {str(to)!r}; name two")
    for option, file in (("--to", to), ("--svg", svg)):
        if file is None:
            continue
        told = f"{option} {str(file)!r}"
        export = find_surrounding_export(file.absolute()) or find_surrounding_export(file.resolve())
        if export is not None:
            raise CommandError(f"{told} lies in {str(export)!r}, an export, which stays as it was written; name another place")
        if file.is_dir() or (file.exists() and not _is_ours(file, _MARKS[option])):
            what = "a folder" if file.is_dir() else "a file that no report has written"
            raise CommandError(f"{told} is {what}; name another file, or move it away")


def write_pages(facts: Facts, to: Path, svg: Path | None) -> Iterator[str]:
    """Write the page, and the picture of the layers alone; tell what was written. Raises `CommandError` where that cannot be."""
    texts = {"--to": (to, make_page(facts)), "--svg": (svg, draw_layers(facts) + "\n")}
    for option, (file, text) in texts.items():
        if file is None:
            continue
        try:
            with atomic_folder(file.absolute()) as draft:
                write_file(file, text, draft)
        except OSError as error:
            if is_shortage(error):
                raise
            raise CommandError(f"{option} {str(file)!r} cannot be written: {error.strerror or error}; name another file") from error
        yield f"wrote {file}"


def _is_ours(file: Path, mark: str) -> bool:
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with file.open(encoding="utf-8") as stream:
            return mark in stream.read(_MARKED_CHARACTERS)
    except (OSError, ValueError):
        return False
