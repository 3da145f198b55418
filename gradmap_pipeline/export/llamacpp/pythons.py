"""What a Python needs to convert a model to GGUF, and to run what comes out."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ...errors import OptionError
from ...machine.processes import ask_program

REWRITER = Path(__file__).with_name("rewrite_gguf.py")
QUANTIZER = Path(__file__).with_name("quantize_file.py")
RUNNER = Path(__file__).with_name("run_gguf.py")
DECODER = Path(__file__).with_name("decode_gguf.py")

BINDINGS = "llama-cpp-python"
_MODULES = ("gguf", "numpy", "torch", "transformers", "sentencepiece")
"""What llama.cpp's converter imports; the last for most models, whether or not they have a `tokenizer.model`."""
NAME_OPTION = "--model-name"
_OPTIONS = ("--outfile", "--outtype", "--vocab-only")
"""Options of the converter, by which it is known: llama.cpp's other programs for files lack one."""
_PATIENCE = 30.0
"""Seconds that a Python has to say what it lacks."""
_ASK = """
import json, sys
from importlib.util import find_spec
sys.path[1:1] = sys.argv[2:]
def is_missing(name):
    try:
        return find_spec(name) is None
    except ImportError:
        return True
print(json.dumps([name for name in json.loads(sys.argv[1]) if is_missing(name)]))
"""


class RunsInPython:
    """A program of llama.cpp whose step names the Python that has its modules."""

    python: Path | None
    """None: this one."""

    @property
    def python_path(self) -> str:
        """The Python that is named, or this one."""
        return str(self.python or sys.executable)

    @property
    def runner(self) -> str | None:
        """A Python with llama-cpp-python, which runs files; None where there is none."""
        return find_runner((self.python_path, sys.executable))

    def explain_no_runner(self) -> str:
        """What follows where there is no runner, and the command that installs one."""
        return explain_no_runner(self.python_path)


def find_modules(converter: Path) -> list[str]:
    """The folder of a converter's own `gguf` module, which it takes before any that is installed; none where it has none."""
    folder = converter.parent / "gguf-py"
    return [str(folder)] if folder.is_dir() else []


def explain_missing(python: str, converter: Path) -> str | None:
    """The modules that the converter imports and this Python lacks, with the command that installs them; None where it has all."""
    text = _read_converter(converter)
    imported = [name for name in _MODULES if re.search(rf"^\s*(import|from) {re.escape(name)}\b", text, re.MULTILINE)]
    missing = _ask(python, tuple(imported), tuple(find_modules(converter)))
    if missing is None:
        return f"{python!r} does not run as a Python"
    if not missing:
        return None
    return f"llama.cpp's converter needs {', '.join(missing)}, which {python!r} lacks: {python} -m pip install {' '.join(missing)}"


def check_converter(file: Path) -> None:
    """Raise `OptionError` unless a file looks like llama.cpp's converter."""
    if not file.is_file():
        raise OptionError("converter", f"there is no file {str(file)!r}")
    text = file.read_bytes()
    missing = [option for option in _OPTIONS if option.encode() not in text]
    if missing or b"\0" in text:
        why = "is no Python file" if b"\0" in text else f"has no option {missing[0]}"
        raise OptionError("converter", f"{str(file)!r} {why}, so it is not llama.cpp's converter")


def check_program(option: str, file: Path | None) -> None:
    """Raise `OptionError` where an option names no file, or one that may not be started."""
    if file is None:
        return
    if not file.is_file():
        raise OptionError(option, f"there is no file {str(file)!r}")
    if not os.access(file, os.X_OK):
        raise OptionError(option, f"{str(file)!r} may not be started: chmod +x {shlex.quote(str(file))}")


def takes_name(converter: Path) -> bool:
    """Whether the converter can be told the model's name; others take that of the folder."""
    return NAME_OPTION in converter.read_text(encoding="utf-8", errors="replace")


def find_runner(pythons: Sequence[str]) -> str | None:
    """The first of these Pythons that has llama-cpp-python; None where none has."""
    return next((python for python in pythons if _ask(python, ("llama_cpp",), ()) == []), None)


def explain_no_runner(python: str) -> str:
    """What follows where no Python has llama-cpp-python, and the command that installs it in this one."""
    return f"nothing runs the file, as {python!r} lacks {BINDINGS}: {python} -m pip install {BINDINGS}"


def knows(converter: Path, architecture: str) -> bool:
    """Whether the converter registers this class of transformers; true of one that registers none by name."""
    text = _read_converter(converter)
    return f'"{architecture}"' in text or ".register(" not in text


def _read_converter(converter: Path) -> str:
    """Its source, which newer ones spread over a folder beside them."""
    files = [converter, *sorted((converter.parent / "conversion").glob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


@lru_cache(maxsize=16)
def _ask(python: str, modules: tuple[str, ...], folders: tuple[str, ...]) -> list[str] | None:
    """Those of the modules that a Python lacks; None where it cannot be asked. Nothing is imported there."""
    if not modules:
        return []
    try:
        code, said = ask_program([python, "-c", _ASK, json.dumps(modules), *folders], _PATIENCE)
        missing = json.loads((said.strip().splitlines() or [""])[-1])
    except (OSError, ValueError, RecursionError):
        return None
    return missing if code == 0 and isinstance(missing, list) and set(missing) <= set(modules) else None
