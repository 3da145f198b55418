"""What a model folder may hold, told from names, links and JSON alone: no link out of it, no adapter, no pointer of git-lfs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import ModelError
from ..machine.file_kinds import describe_other
from .infinities import find_infinite

INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
"""Subfolder of further chat templates."""

_WEIGHTS = "model.safetensors"
_LFS_POINTER = b"version https://git-lfs.github.com/"
_DEEPEST = 64
"""Levels of nesting in a JSON file; configs have about six."""
_OF_FILES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of files that a model is read from; other programs have folders of theirs beside it."""
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def read_json(file: Path, *, may_be_infinite: bool = False) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `ModelError` for every other file.

    JSON has no word for infinity or NaN, and most programs refuse the words that Python writes for them. `may_be_infinite`: read
    them all the same.
    """
    try:
        text = file.read_bytes()
        check_pointer(file, text)
        content = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{str(file)!r} cannot be read: it is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ModelError(f"{str(file)!r} cannot be read: it is nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{str(file)!r} must hold a JSON object, found {type(content).__name__}")
    if _measure_depth(content) > _DEEPEST:
        raise ModelError(f"{str(file)!r} cannot be read: it is nested more than {_DEEPEST} levels deep")
    infinite = None if may_be_infinite else next(find_infinite(content), None)
    if infinite is not None:
        raise ModelError(f"{str(file)!r} has {infinite[1]} as {infinite[0]!r}; JSON has only finite numbers")
    return content


def check_pointer(file: Path, start: bytes) -> None:
    """Raise `ModelError` where a file starts as what git-lfs leaves in place of a large one."""
    if start.startswith(_LFS_POINTER):
        raise ModelError(f"{str(file)!r} is a git-lfs pointer, not the file itself; run `git lfs pull` in {str(file.parent)!r}")


def check_folder(folder: Path) -> None:
    """Raise `ModelError` where files of a folder are links out of it, or change the model when it is loaded."""
    names = {path.name for path in folder.iterdir()}
    adapter = next((name for name in _ADAPTERS if name in names), None)
    if adapter is not None:
        _refuse_adapter(folder, adapter, has_weights="config.json" in names and _has_weights(names))
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")]):
        other = describe_other(path)
        if other is not None and (path.suffix in _OF_FILES or not path.is_dir()) and _is_inside(folder, path):
            raise ModelError(f"{str(path)!r} is {other}, not a file")
        if path.is_symlink() and (path.name == TEMPLATES or not path.is_dir()):
            check_inside(folder, path)


def check_inside(folder: Path, file: Path) -> None:
    """Raise `ModelError` unless a file lies in its model folder, or where the hub's cache keeps files."""
    try:
        home, real = folder.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ModelError(f"{str(file)!r} is a link that leads nowhere") from error
    blobs = home.parent.parent / "blobs"
    is_cached = home.parent.name == "snapshots" and real.parent == blobs
    if not (real.is_relative_to(home) or is_cached):
        raise ModelError(f"{str(file)!r} is a link to {str(real)!r}, outside the model folder; put the file itself there")


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether a path, its links followed, stays in the model folder."""
    try:
        check_inside(folder, path)
    except ModelError:
        return False
    return True


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files that make up the model."""
    if (folder / _WEIGHTS).is_file():
        files = [folder / _WEIGHTS]
    elif (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(read_weight_map(folder).values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"{str(folder)!r} has {len(files)} safetensors files but no {INDEX}")
    for file in files:
        if not file.is_file():
            raise ModelError(f"{str(folder)!r} lacks the shard {file.name!r} that its index names; download it again")
        check_inside(folder, file)
    return files


def read_weight_map(folder: Path) -> dict[str, str]:
    """By tensor, the shard that holds it, as the index says."""
    index = folder / INDEX
    shards: object = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{str(index)!r} must hold a 'weight_map' from the names of tensors to files; download it again")
    for name in sorted(set(shards.values())):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or path.suffix != ".safetensors":
            raise ModelError(f"{str(index)!r} names {name!r}, which is not a safetensors file in its folder")
    return shards


def _has_weights(names: Iterable[str]) -> bool:
    return any(name.endswith(".safetensors") and name not in _ADAPTERS for name in names)


def _refuse_adapter(folder: Path, adapter: str, *, has_weights: bool) -> None:
    if has_weights:
        raise ModelError(
            f"{str(folder)!r} holds an adapter ({adapter}) beside the model's weights, and transformers may add it to them; "
            "merge it first, or move it elsewhere"
        )
    base = None
    if (folder / _ADAPTERS[0]).is_file():
        base = read_json(folder / _ADAPTERS[0]).get("base_model_name_or_path")
    of = f" of {base!r}" if isinstance(base, str) else ""
    raise ModelError(f"{str(folder)!r} is an adapter{of}: merge it first (merge_and_unload of peft), and prune the merged model")


def _measure_depth(content: object) -> int:
    depth, level = 0, [content]
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [value for values in inner for value in values]
    return depth
