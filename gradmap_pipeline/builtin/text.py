"""Text that every Python has: the standard library's sources and language topics, split by module."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

Split = Literal["calibration", "heldout"]

HELDOUT_SHARE = 0.1
"""Share of the modules that training and calibration never see."""

_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "test", "turtledemo"}
"""Tables, demos and tests: packages that some distributions leave out, or that hold data rather than text."""

Document = tuple[str, str, Callable[[], str]]
"""(unit that goes to one split as a whole, name, how to read it)"""


def load_documents(split: Split) -> list[str]:
    """Read the documents of one split, in an order that depends on their names alone.

    A document is one source file or one language topic of `pydoc_data`. A package goes to one split
    as a whole, so no held-out file has a sibling in the calibration text.
    """
    return _choose(split, _find_library())


def load_training_documents() -> list[str]:
    """Read the calibration documents and, where it is installed, the library's test suite but for the held-out modules' tests."""
    return _choose("calibration", [*_find_library(), *_find_tests()])


def _choose(split: Split, documents: Iterable[Document]) -> list[str]:
    is_heldout = split == "heldout"
    named = [(name, read()) for unit, name, read in documents if (_unit_interval(unit) < HELDOUT_SHARE) == is_heldout]
    return [text for name, text in sorted(named, key=lambda document: _unit_interval(document[0])) if text.strip()]


def _find_tests() -> Iterator[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted((library / "test").rglob("*.py")):
        parts = file.relative_to(library).parts
        yield Path(parts[1]).stem.removeprefix("test_"), "/".join(parts), partial(_read, file)


def _find_library() -> Iterator[Document]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - _LEFT_OUT - {"pydoc_data"}):
        package = library / module
        files = sorted(package.rglob("*.py")) if package.is_dir() else [library / f"{module}.py"]
        for file in files:
            parts = file.relative_to(library).parts
            if not file.is_file() or "__pycache__" in parts or "test" in parts or "tests" in parts:
                continue
            yield module, "/".join(parts), partial(_read, file)
    from pydoc_data.topics import topics

    named: dict[str, str] = {}
    for topic, text in topics.items():
        named.setdefault(text, topic)  # one text may stand under two topics
    for text, topic in named.items():
        yield f"topic {topic}", f"topic {topic}", partial(str, text)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _unit_interval(name: str) -> float:
    """Map a name to [0, 1), the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
