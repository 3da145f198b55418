"""Which local files a data set is made of, and what keeps a file from being one."""

from __future__ import annotations

import os
from pathlib import Path

from ..machine.file_kinds import describe_other

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
"""Suffixes that may follow those of text files."""

_METADATA = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
_NOTES = ("readme", "license", "notice", "citation", "changelog")
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"


def format_of(file: Path) -> str | None:
    """`text`, `json`, `csv`, `parquet` or `arrow`, by the suffix; None for other files."""
    file_format = FORMATS.get(_suffix_of(file))
    return None if compression_of(file) and file_format in ("parquet", "arrow") else file_format


def compression_of(file: Path) -> str | None:
    """`gzip`, `bz2`, `xz` or `zstd`, by the last suffix; None for other files."""
    return COMPRESSIONS.get(file.suffix.lower())


def find_files(path: Path) -> list[Path]:
    """The file that is named, or the data files of a folder in order of their names. Raises `ValueError`.

    Files that describe data (`dataset_infos.json`, `README.txt`, hidden ones) are not data.
    """
    if not path.exists():
        raise ValueError(f"no file or folder {str(path)!r}; relative paths start at the current folder, {str(Path.cwd())!r}")
    if path.is_dir():
        files = _list_folder(path)
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"{str(path)!r} is neither a file nor a folder")
    if not files or format_of(files[0]) is None:
        raise ValueError(f"{str(path)!r} is not, and does not hold, a file of the kinds {', '.join(FORMATS)}{_advise(path)}")
    suffixes = sorted({_suffix_of(file) for file in files})
    if len({FORMATS[suffix] for suffix in suffixes}) > 1:
        mixed = ", ".join(suffixes)
        raise ValueError(f"folder {str(path)!r} mixes files of the kinds {mixed}; name one file, or split the folder")
    for file in files:
        _check_file(file)
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{str(path)!r} {'holds only empty files' if path.is_dir() else 'is empty'}; it must hold text")
    return files


def _suffix_of(file: Path) -> str:
    return (Path(file.stem) if compression_of(file) else file).suffix.lower()


def _list_folder(folder: Path) -> list[Path]:
    for name, content in (("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (folder / name).is_file() and any(folder.glob("*.safetensors")):
            raise ValueError(f"{str(folder)!r} is the folder of {content}, not of data")
    named = sorted(file for file in folder.iterdir() if format_of(file) is not None and not _is_about_data(file))
    for file in named:
        other = describe_other(file)
        if other is not None and not file.is_dir():
            raise ValueError(f"{str(file)!r} is {other}, not a file")
    files = [file for file in named if file.is_file()]
    inner = next((file for file in named if file.is_dir()), None)
    if files and inner is not None:
        raise ValueError(f"{str(inner)!r} is a folder, not a file; name it alone, or move it elsewhere")
    return files


def _is_about_data(file: Path) -> bool:
    name = file.name.lower()
    return name.startswith((".", "__")) or name in _METADATA or (format_of(file) == "text" and Path(name).stem.startswith(_NOTES))


def _advise(path: Path) -> str:
    """What else the path may have been meant for."""
    if not path.is_dir():
        return ""
    inside = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    with_data = [name for name in inside if any(format_of(file) for file in (path / name).iterdir())]
    return f"; name one of its folders: {', '.join(with_data)}" if with_data else ""


def _check_file(file: Path) -> None:
    if not os.access(file, os.R_OK):
        raise ValueError(f"{str(file)!r} cannot be read: permission denied")
    with file.open("rb") as stream:
        if stream.read(len(_LFS_HEAD)) == _LFS_HEAD:
            raise ValueError(f"{str(file)!r} is a git-lfs pointer, not the data; run `git lfs pull` in its folder")
