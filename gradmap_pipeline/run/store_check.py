"""Compare all that a store keeps with its digests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifacts import Artifact
from ..machine.digests import sha256_of
from .store_entries import Entry, list_entries
from .store_files import is_own_file, read_object

if TYPE_CHECKING:
    from ..recipe.catalog import Catalog

_OUTPUTS = "outputs.json"


@dataclass(frozen=True)
class Finding:
    """What is wrong with one thing that a store keeps."""

    entry: Entry
    reason: str
    is_damage: bool = True
    """Else something elsewhere has changed that a result rests on, or the result cannot be looked at."""


def check_store(root: Path, catalog: Catalog) -> tuple[int, list[Finding]]:
    """How many results, units and records were looked at, and what is wrong. `catalog`: tells which files belong to a result."""
    findings: list[Finding] = []
    entries = [entry for entry in list_entries(root) if entry.sort in ("step", "unit", "record")]
    for entry in entries:
        if entry.sort == "step":
            findings += _check_step(entry, root, catalog)
        elif entry.sort == "unit":
            findings += _check_unit(entry)
        elif entry.path.suffix == ".json" and not read_object(entry.path):
            findings.append(Finding(entry, "is not as it was written"))
    return len(entries), findings


def _check_step(entry: Entry, root: Path, catalog: Catalog) -> Iterator[Finding]:
    record = read_object(entry.path / _OUTPUTS)
    if not str(record.get("key", "")).startswith(entry.key):
        yield Finding(entry, f"its {_OUTPUTS} is missing, or not as it was written")
        return
    stage = catalog.find(entry.name)
    if stage is None:
        yield Finding(entry, "its files were not looked at, as its stage is not installed; name its file with --plugin", False)
        return
    try:
        outputs = stage.Outputs.model_validate(record.get("outputs"), context={"store": root})
    except ValueError:
        yield Finding(entry, "its outputs are of another version of the stage, so it is made again", False)
        return
    for name in type(outputs).model_fields:
        artifact = getattr(outputs, name)
        for path, digest in artifact.files_by_path().items() if isinstance(artifact, Artifact) else ():
            reason = _explain_file(path, digest)
            if reason is not None:
                shown = path.relative_to(root) if path.is_relative_to(root) else path
                yield Finding(entry, f"{str(shown)!r} {reason}", path.is_relative_to(root))


def _check_unit(entry: Entry) -> Iterator[Finding]:
    file, tensors = (entry.path.with_name(entry.path.name + ending) for ending in (".json", ".safetensors"))
    unit = read_object(file)
    if file.exists() and not unit:
        yield Finding(entry, "is not as it was written")
    elif unit and is_own_file(tensors):
        reason = _explain_file(tensors, str(unit.get("value")))
        if reason is not None:
            yield Finding(entry, f"{tensors.name!r} {reason}")


def _explain_file(path: Path, digest: str) -> str | None:
    try:
        return None if sha256_of(path) == digest else "is not as it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
