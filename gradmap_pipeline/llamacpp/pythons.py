"""What a Python needs to convert a model to GGUF, and to run what comes out."""

from __future__ import annotations

import json
import re
import subprocess
from functools import lru_cache
from pathlib import Path

from ..processes import tie

REWRITER = Path(__file__).with_name("rewrite_gguf.py")
ADVICE = "pip install llama-cpp-python, and the next export is run beside the model"

_MODULES = ("gguf", "numpy", "torch", "transformers", "sentencepiece", "google.protobuf")
"""What llama.cpp's converter imports, for one model or another."""
_PACKAGES = {"google.protobuf": "protobuf"}
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


def find_modules(converter: Path) -> list[str]:
    """The folder of a converter's own `gguf` module, which it takes before any that is installed; none where it has none."""
    folder = converter.parent / "gguf-py"
    return [str(folder)] if folder.is_dir() else []


def explain_missing(python: str, converter: Path) -> str | None:
    """The modules that the converter imports and this Python lacks, with the command that installs them; None where it has all."""
    text = converter.read_text(encoding="utf-8", errors="replace")
    base = converter.parent / "conversion" / "base.py"
    text += base.read_text(encoding="utf-8", errors="replace") if base.is_file() else ""
    imported = [name for name in _MODULES if re.search(rf"^\s*(import|from) {re.escape(name)}\b", text, re.MULTILINE)]
    missing = _ask(python, tuple(imported), tuple(find_modules(converter)))
    if missing is None:
        return f"{python!r} does not run as a Python"
    if not missing:
        return None
    packages = " ".join(_PACKAGES.get(name, name) for name in missing)
    return f"llama.cpp's converter needs {', '.join(missing)}, which {python!r} lacks: {python} -m pip install {packages}"


def has_bindings(python: str) -> bool:
    """Whether this Python has llama-cpp-python."""
    return _ask(python, ("llama_cpp",), ()) == []


@lru_cache(maxsize=16)
def _ask(python: str, modules: tuple[str, ...], folders: tuple[str, ...]) -> list[str] | None:
    """Those of the modules that a Python lacks; None where it cannot be asked. Nothing is imported there."""
    if not modules:
        return []
    try:
        command = tie([python, "-c", _ASK, json.dumps(modules), *folders])
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
        missing: list[str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return missing if done.returncode == 0 else None
