"""A folder of lm-eval tasks: its files, the files that those include and the data that they name."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, RootModel, field_validator

from .configs import TaskFile, read_task_file
from .data_files import find_data


class TaskFolder(RootModel[Path]):
    """A folder of tasks. It counts by the content of its files, and of the files outside that its tasks name."""

    model_config = ConfigDict(frozen=True)

    @field_validator("root")
    @classmethod
    def _must_be_there(cls, folder: Path) -> Path:
        if not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is not a folder; name one that holds tasks as YAML files")
        return folder

    def fingerprint(self, digest_of: Callable[[Path], str]) -> Any:
        """What the files hold."""
        inside = {str(file.relative_to(self.root)): digest_of(file) for file in self._own_files()}
        return {"inside": inside, "outside": [digest_of(file) for file in self.outside_files()]}

    def local_paths(self) -> list[Path]:
        """Files and folders on this machine that are read; what a faulty file names is not known before its fault is told."""
        try:
            return [self.root, *self.outside_files()]
        except (ValueError, OSError):
            return [self.root]

    def outside_files(self) -> list[Path]:
        """Files beyond the folder that its tasks include, or name as data."""
        root = self.root.resolve()
        named: dict[Path, None] = {}
        for task in self.task_files():
            for place in [task.path, *(data for name in task.data_names() for data in find_data(name, [task.path.parent]))]:
                held = place.rglob("*") if place.is_dir() else [place]
                inside = sorted(file for file in held if file.is_file())
                named |= dict.fromkeys(file for file in inside if not file.resolve().is_relative_to(root))
        return list(named)

    def task_files(self) -> list[TaskFile]:
        """The folder's YAML files and all that they include, but for those of lm-eval itself. Raises `ValueError`."""
        files: dict[Path, TaskFile] = {}
        waiting = self.yaml_files()
        while waiting:
            path = waiting.pop(0)
            if path.resolve() in files or _is_of_library(path):
                continue
            file = files[path.resolve()] = read_task_file(path)
            waiting += file.includes()
        return list(files.values())

    def find_bases(self, files: Mapping[Path, TaskFile], starts: Sequence[Path]) -> list[Path]:
        """Where relative paths of data may start: the folders of some files and of what those include, then this folder.

        `files`: those of the folder, by their resolved paths.
        """
        waiting, seen, folders = list(starts), set[Path](), dict[Path, None]()
        while waiting:
            path = waiting.pop(0)
            folders[path.parent] = None
            if path in files and path not in seen:
                seen.add(path)
                waiting += [include.resolve() for include in files[path].includes()]
        return list(dict.fromkeys([*folders, self.root]))

    def misnamed_files(self) -> list[TaskFile]:
        """Files that would define tasks, but that lm-eval does not read for the end of their names."""
        files = []
        for file in self._own_files():
            if file.suffix == ".yml":
                with suppress(ValueError):  # it may belong to another program
                    files.append(read_task_file(file))
        return files

    def yaml_files(self) -> list[Path]:
        """The files in which lm-eval looks for tasks."""
        return [file for file in self._own_files() if file.suffix == ".yaml"]

    def find_code(self) -> Iterator[str]:
        """For each place where a task would have Python run: where it is, and what it is."""
        for file in self.task_files():
            yield from file.find_code()

    def _own_files(self) -> list[Path]:
        def is_hidden(file: Path) -> bool:
            return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(self.root).parts)

        return [file for file in sorted(self.root.rglob("*")) if file.is_file() and not is_hidden(file)]


def _is_of_library(path: Path) -> bool:
    """Whether a file comes with lm-eval, whose code runs anyway."""
    spec = importlib.util.find_spec("lm_eval")
    return spec is not None and spec.origin is not None and path.resolve().is_relative_to(Path(spec.origin).parent)
