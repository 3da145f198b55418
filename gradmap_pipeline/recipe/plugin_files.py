"""Single files as plugins, which import the modules beside them; no other code gets these, nor do they get each other's.

The folder of such a file is a package of its own, under a name that no other package has. In its modules, `import helper` means the
`helper` beside them. Their bytecode is neither read nor written, so that the source as it is now is what runs.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ..artifacts import Artifact
from ..errors import add_article
from ..stages.stage import name_types

_PREFIX = "gradmap_plugin_files_"
_PACKAGE = __name__.partition(".")[0]
_NEVER = sys.stdlib_module_names | {_PACKAGE, f"{_PACKAGE.partition('_')[0]}_plugins"}
"""Names that mean the same in every plugin, whatever lies beside it."""
_folders: dict[str, Path] = {}
"""By name of a package: its folder."""


def find_neighbours(folder: Path) -> dict[str, Path]:
    """Source files of modules and packages that the files of a folder can import by name."""
    packages = {file.parent.name: file for file in folder.glob("*/__init__.py")}
    modules = packages | {file.stem: file for file in folder.glob("*.py")}
    return {name: file for name, file in modules.items() if name not in _NEVER}


def _has_neighbour(folder: Path, name: str) -> bool:
    return name not in _NEVER and ((folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file())


def open_folder(folder: Path) -> str:
    """Make the modules of a folder importable under a package, afresh; return its name."""
    name = _PREFIX + hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]
    package = ModuleType(name)
    package.__path__ = [str(folder.resolve())]
    package.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules[name] = package
    _folders[name] = folder.resolve()
    if not any(finder is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder)
    importlib.invalidate_caches()
    return name


def name_module(file: Path) -> str:
    """The name, within the package of its folder, of a plugin file."""
    return file.resolve().stem.replace(".", "-dot-")


def folder_of(module: str) -> Path | None:
    """The folder of the plugin file that a module belongs to; None for all other modules."""
    return _folders.get(module.partition(".")[0])


def show_module(module: str, *, is_whole: bool = False) -> str:
    """A module as its author knows it: by its name, or where it belongs to a plugin file, by its file."""
    folder = folder_of(module)
    file = getattr(sys.modules.get(module), "__file__", None)
    if folder is None or file is None:
        return module
    return str(file) if is_whole else str(Path(file).relative_to(folder))


def name_apart(wanted: Sequence[type[Artifact]], given: type[Artifact]) -> tuple[str, str]:
    """Classes that are wanted, and one that is found instead, as in `a Model`: with their modules where the name is the same."""
    same = [cls for cls in wanted if cls.__name__ == given.__name__]
    if not same:
        return add_article(name_types(wanted)), add_article(given.__name__)
    shown = {show_module(cls.__module__) for cls in (*same, given)}
    is_whole = len(shown) <= len(same)
    places = {cls: f"{cls.__name__} ({show_module(cls.__module__, is_whole=is_whole)})" for cls in (*same, given)}
    return add_article(" or ".join(places.get(cls, cls.__name__) for cls in wanted)), add_article(places[given])


class _Finder:
    """Finds the modules of these packages."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        top, _, rest = name.partition(".")
        if top not in _folders or not rest:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:  # a plugin file whose name is not a name of a module
            file = next((file for file in _folders[top].glob("*.py") if name_module(file) == rest), None)
            return None if file is None else ModuleSpec(name, _Loader(name, str(file)), origin=str(file))
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module whose imports look beside it first."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        package = module.__name__.partition(".")[0]
        folder = _folders[package]

        def look_beside(
            name: str,
            globals: Mapping[str, Any] | None = None,  # noqa: A002 - as the function that it stands for
            locals: Mapping[str, Any] | None = None,  # noqa: A002
            fromlist: Sequence[str] | None = (),
            level: int = 0,
        ) -> Any:
            top = name.partition(".")[0]
            if level or not _has_neighbour(folder, top):
                return builtins.__import__(name, globals, locals, fromlist or (), level)
            neighbour = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or ("",), 0)
            return neighbour if fromlist else sys.modules[f"{package}.{top}"]

        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": look_beside}
        super().exec_module(module)
