"""The files of a model besides its weights and config.json: tokenizer, chat templates, generation config, licence."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from .files import TEMPLATES, check_inside, read_json

_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "*vocab.json",
    "*vocab.txt",
    "merges*",
    "special_tokens*",
    "added_tokens*",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.codes",
    "*.tokenizer",
    "tekken.json",
    "emoji.json",
    "normalizer.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "vocab-*.json",
    "dict.txt",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
)
"""Files that tokenisation and chat templates depend on; `tests/faults` compares them with what transformers' tokenizers name."""
_LICENCES = ("*license*", "*licence*", "copying*", "*notice*", "*use_policy*")
_OTHERS = ("generation_config.json", "*processor_config.json")
_NEVER = (
    ".py",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".npz",
    ".safetensors",
    ".onnx",
    ".gguf",
    ".zip",
)
"""Endings of code, pickles and weights."""
CODE_KEY = "auto_map"
"""Where a JSON file names the classes of custom code."""


def find_tokenizer_files(folder: Path) -> list[Path]:
    """Files that turn text into ids and chats into text."""
    return _find(folder, _TOKENIZER)


def find_licences(folder: Path) -> list[Path]:
    """Licences, notices and policies, whatever their case."""
    return _find(folder, _LICENCES)


def find_companions(folder: Path) -> list[Path]:
    """All files besides weights and config.json that belong to the model."""
    return sorted({*_find(folder, _TOKENIZER), *_find(folder, _LICENCES), *_find(folder, _OTHERS)})


def copy_companions(source: Path, target: Path) -> None:
    """Copy them. Classes of custom code are left out of JSON files, since that code is neither run nor copied."""
    for companion in find_companions(source):
        copy = target / companion.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        content = read_json(companion) if _is_config(companion.name) else {}
        if CODE_KEY in content:
            del content[CODE_KEY]
            copy.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(companion, copy)


def describe_left_out(folder: Path) -> str | None:
    """What an export of this model leaves out, for its user; None: nothing."""
    configs = [folder / "config.json", *(file for file in find_companions(folder) if _is_config(file.name))]
    named = [file.name for file in configs if CODE_KEY in read_json(file, may_be_infinite=file.name == "config.json")]
    if not named:
        return None
    return (
        f"left out {CODE_KEY!r} of {' and '.join(named)}, and the code it names: custom code is neither run nor copied, and "
        "transformers' own classes load the folder"
    )


def _is_config(name: str) -> bool:
    return name in ("tokenizer_config.json", "generation_config.json") or name.endswith("processor_config.json")


def _find(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Regular files at the top, and chat templates in their folder, that match one of the patterns, whatever their case."""
    files = [*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]
    names = {file: file.relative_to(folder).as_posix() for file in files if file.is_file()}
    wanted = [
        file
        for file, name in names.items()
        if not name.casefold().endswith(_NEVER) and any(_matches(name, pattern) for pattern in patterns)
    ]
    for file in wanted:
        check_inside(folder, file)
    return sorted(wanted)


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name.casefold(), pattern.casefold())
