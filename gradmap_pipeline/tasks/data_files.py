"""Data that a task names on this machine: found from the current folder or beside its YAML, and read by their names."""

from __future__ import annotations

from collections.abc import Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from ..errors import StageError, first_line

READERS = ("json", "csv", "parquet", "arrow", "text")
"""Values of `dataset_path` by which lm-eval reads local files."""


def find_data(name: str, folders: Sequence[Path]) -> list[Path]:
    """Files or folders of this name, else those that it matches as a pattern: in the current folder, else in others."""
    if "://" in name or not name or "\0" in name:
        return []
    for folder in (Path(), *folders):
        if (folder / name).exists():
            return [folder / name]
    for folder in (Path(), *folders):
        if has_magic(name) and (matches := sorted(glob(name, root_dir=folder, recursive=True))):
            return [folder / match for match in matches]
    return []


def load_local(reader: str, name: str | None, options: dict[str, Any], folders: Sequence[Path], scratch: Path) -> Any:
    """What `datasets.load_dataset` gives, by one of its own readers, for data on this machine.

    `datasets` takes names for patterns, and some for addresses, so it gets links with plain names, in `scratch`.
    Nothing is asked of the network.
    """
    import datasets

    links: list[str] = []

    def link(target: Path) -> str:
        place = scratch / f"{len(links)}{''.join(suffix for suffix in target.suffixes[-2:] if suffix[1:].isalnum())}"
        place.symlink_to(target.resolve())
        links.append(str(place))
        return str(place)

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [linked for item in value for linked in _as_list(replace(item))]
        if "://" in str(value):
            return value
        targets = find_data(str(value), folders)
        if not targets:
            beside = ", ".join(sorted({repr(str(folder)) for folder in folders}))
            raise StageError(
                f"no data {str(value)!r}: looked in the current folder, {str(Path.cwd())!r}, and beside the task, {beside}"
            )
        linked = [link(target) for target in targets]
        return linked[0] if len(linked) == 1 else linked

    changed = {key: replace(value) if key in ("data_files", "data_dir") else value for key, value in options.items()}
    path = reader if reader in READERS else replace(reader)
    counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return datasets.load_dataset(path, name=name, cache_dir=str(scratch / "cache"), **changed)
    except StageError:
        raise
    except Exception as error:  # its readers fail in as many ways as there are formats
        told = error.__cause__ or error
        raise StageError(f"cannot read the task's data ({type(told).__name__}: {first_line(told)}); named: {options}") from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
