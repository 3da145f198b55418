"""Which source files a stage's results depend on: its module, and every module of its plugin and of this package behind it.

Imports are read from the sources, not from what is loaded: a helper that `run` imports counts before `run` is called.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.metadata import Distribution
from itertools import accumulate
from pathlib import Path

from ..api import HOMES
from ..machine.digests import sha256_of, sha256_of_value
from .plugin_files import find_neighbours, folder_of, name_module

_PACKAGE = __name__.partition(".")[0]
_OURS = f"{_PACKAGE.partition('_')[0]}_plugins"
_WITHOUT_RESULTS = {f"{_PACKAGE}.{name}" for name in ("errors", "interruptions", "machine.extras", "cost")}
"""Modules and packages that say what went wrong or what a run would take. A change there makes no other result."""


@dataclass(frozen=True)
class StageCode:
    """The code that makes a stage's results."""

    module: str
    """The module that defines the stage."""
    distribution: str | None = None
    """Name and version of the distribution that installs it; None for a single file, and for the stages of this package."""
    packages: tuple[str, ...] = ()
    """Top-level packages and modules of that distribution."""
    folder: Path | None = None
    """Of a plugin file, whose modules go without the name of their package here: the folder that it shares with them."""
    behind: tuple[StageCode, ...] = ()
    """The code of stages whose own classes of artifacts the stage gets, and whose methods it therefore runs."""

    @classmethod
    def of(cls, module: str, distribution: Distribution | None) -> StageCode:
        """The code of a stage defined in `module`, which came with `distribution`."""
        folder = folder_of(module)
        if folder is not None:
            return cls(module.partition(".")[2], folder=folder)
        top = module.partition(".")[0]
        if distribution is None or top in (_PACKAGE, _OURS):
            return cls(module, packages=(top,))
        listed = (distribution.read_text("top_level.txt") or "").split()
        packages = {top, *listed} - {_PACKAGE, _OURS}
        return cls(module, f"{distribution.name} {distribution.version}", tuple(sorted(packages)))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Source files by module name: the stage's module and all that it imports, at any depth.

        Modules of its distribution and of this package count; of a single file, those beside it. What only type checkers read
        is left out.
        """
        known: dict[str, Path] = {}
        waiting = [self.module]
        while waiting:
            name = waiting.pop()
            if name in known or _WITHOUT_RESULTS & set(_prefixes(name)):
                continue
            file = self._find_file(name)
            if file is None:
                continue
            known[name] = file
            parent = name.rpartition(".")[0]
            if name != _PACKAGE:
                waiting += _read_imports(name, file.read_bytes(), is_package=file.name == "__init__.py")
            waiting += [parent] if parent else []
        known.pop(_PACKAGE, None)  # a list of public names, which are looked up one by one
        return known

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides what the code does."""
        own = [self.distribution, {name: sha256_of(file) for name, file in sorted(self.files.items())}]
        return sha256_of_value([*own, *(code.digest for code in self.behind)])

    @staticmethod
    def is_shipped(stage_class: type) -> bool:
        """Whether a class is of this package, or of the stages that come with it."""
        return stage_class.__module__.partition(".")[0] in (_PACKAGE, _OURS)

    def is_current(self) -> bool:
        """Whether the sources are still what they were when `digest` was first computed."""
        return self._read_again().digest == self.digest

    def _read_again(self) -> StageCode:
        return replace(self, behind=tuple(code._read_again() for code in self.behind))

    def _find_file(self, name: str) -> Path | None:
        """Source file of a module that counts; None for other libraries, and for names that are no modules."""
        top, *parts = name.split(".")
        root = _find_root(top) if top in (_PACKAGE, *self.packages) else self._neighbours.get(top)
        if root is None and name == self.module and self.folder is not None:  # its name is not a name to import
            root = next((file for file in self.folder.glob("*.py") if name_module(file) == name), None)
        if root is None:
            return None
        if not parts:
            return root
        place = root.parent.joinpath(*parts) if root.name == "__init__.py" else None
        candidates = () if place is None else (place.with_suffix(".py"), place / "__init__.py")
        return next((file for file in candidates if file.is_file()), None)

    @cached_property
    def _neighbours(self) -> dict[str, Path]:
        """Modules and packages in the folder of a plugin file, by name."""
        return {} if self.folder is None else find_neighbours(self.folder)


def _prefixes(name: str) -> Iterator[str]:
    """`a`, `a.b` and `a.b.c` of `a.b.c`."""
    return accumulate(name.split("."), "{}.{}".format)


def _find_root(top: str) -> Path | None:
    """Source file of a top-level module or package, which is not imported for it."""
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None:
        with suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(top)
            file = None if spec is None else spec.origin
    return Path(file) if file and file.endswith(".py") and Path(file).is_file() else None


@cache
def _read_imports(name: str, source: bytes, *, is_package: bool) -> tuple[str, ...]:
    """Names that a module imports, wherever the import stands. Of `from a import b`, both `a` and `a.b`: b may be a module."""
    names: list[str] = []
    for node in _nodes_that_run(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            names += [origin, *(f"{origin}.{alias.name}".lstrip(".") for alias in node.names)]
            if origin == _PACKAGE:
                names += [home for alias in node.names for home in _find_home(alias.name)]
    return tuple(names)


def _nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _nodes_that_run(node)


def _find_home(public_name: str) -> list[str]:
    """The module of this package that a public name comes from."""
    home = HOMES.get(public_name)
    return [f"{_PACKAGE}.{module}" for module in ([home] if home else HOMES.values() if public_name == "*" else [])]
