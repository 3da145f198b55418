"""Results on disk: finished steps by key, and finished units of long steps. A folder that exists is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from .digests import sha256_of, sha256_of_value
from .partial import clear_partial_folders, partial_folder, replace_folder

_OUTPUTS = "outputs.json"
_SHORT = 16  # hexadecimal digits of a key in a folder's name


@dataclass(frozen=True)
class StepFolder:
    """A step's folder while the step runs, and the place it gets when the step has finished."""

    path: Path
    final: Path


class Store:
    """A folder of results, shared by all recipes that use it.

    steps/<stage>-<key>/outputs.json and tensors     units/<stage>-<key>.json     files.json (digests by size and time)
    traceback.txt (of the latest stage that failed unexpectedly)
    environments/<digest>/ (virtual environments of stages that need one)     stage.log (what the latest such stage printed)
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._digests: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Make the folder, keep it out of git, and clear away what killed runs left."""
        for name in ("steps", "units", "environments"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n")
        clear_partial_folders(self.root / "steps")

    @property
    def environments(self) -> Path:
        """Folder of the virtual environments."""
        return self.root / "environments"

    @property
    def log(self) -> Path:
        """File for what a stage in another Python prints."""
        return self.root / "stage.log"

    def load(self, stage: str, key: str, outputs: type[BaseModel]) -> BaseModel | None:
        """Outputs of a finished step, or None when there is none, or when files it wrote elsewhere are gone."""
        return self._load_from(self._step(stage, key), key, outputs)

    def _load_from(self, folder: Path, key: str, outputs: type[BaseModel]) -> BaseModel | None:
        saved = _read_object(folder / _OUTPUTS)
        if saved.get("key") != key:
            return None
        try:
            found = outputs.model_validate(saved.get("outputs"), context={"store": self.root})
        except ValueError:
            return None
        artifacts = [artifact for name in type(found).model_fields if (artifact := getattr(found, name)) is not None]
        return found if all(artifact.is_present() for artifact in artifacts) else None

    @contextmanager
    def step(self, stage: str, key: str) -> Iterator[StepFolder]:
        """A new, empty folder for a step; it vanishes unless `finish` is called."""
        final = self._step(stage, key)
        with partial_folder(final) as path:
            yield StepFolder(path, final)

    def finish(self, folder: StepFolder, key: str, record: dict[str, Any], outputs: BaseModel) -> BaseModel:
        """Write the outputs and move the folder into place, as the last thing. Returns the outputs as stored.

        Where another run has finished the same step meanwhile, its result stays: somebody may be reading it.
        """
        dumped = json.dumps(outputs.model_dump(mode="json", context={"store": self.root}), indent=2)
        inside, final = (path.relative_to(self.root).as_posix() for path in (folder.path, folder.final))
        text = json.dumps({"key": key, **record, "outputs": json.loads(dumped.replace(f'"{inside}/', f'"{final}/'))}, indent=2)
        (folder.path / _OUTPUTS).write_text(text + "\n", encoding="utf-8")
        finished = self._load_from(folder.final, key, type(outputs))
        if finished is not None:
            return finished
        replace_folder(folder.path, folder.final)
        return type(outputs).model_validate(json.loads(text)["outputs"], context={"store": self.root})

    def seconds_of(self, stage: str, key: str) -> float:
        """What a finished step took when it ran, with the units it found finished."""
        return float(_read_object(self._step(stage, key) / _OUTPUTS).get("seconds", 0.0))

    def load_unit(self, stage: str, key: str) -> dict[str, Any] | None:
        """A finished unit of work: `value` (JSON) and the `seconds` it took; or None."""
        found = _read_object(self._unit(stage, key))
        return found if found.keys() == {"value", "seconds"} else None

    def save_unit(self, stage: str, key: str, value: Any, seconds: float) -> None:
        """Keep a unit of work, even if its step does not finish."""
        _write_whole(self._unit(stage, key), json.dumps({"value": value, "seconds": seconds}))

    def save_traceback(self, text: str) -> Path:
        """Keep the traceback of the latest failure for whoever wrote the stage."""
        file = self.root / "traceback.txt"
        _write_whole(file, text)
        return file

    def digest_of(self, file: Path) -> str:
        """SHA-256 of a file, remembered as long as its size and time of change stay the same."""
        resolved = file.resolve()
        if len(resolved.name) == 64 and resolved.parent.name == "blobs":
            return resolved.name  # the hub's cache names large files by their SHA-256
        if self._digests is None:
            self._digests = _read_object(self.root / "files.json")
        status = resolved.stat()
        state = [status.st_size, status.st_mtime_ns]
        remembered = self._digests.get(str(resolved))
        if not isinstance(remembered, list) or remembered[:2] != state:
            self._digests[str(resolved)] = remembered = [*state, sha256_of(resolved)]
            _write_whole(self.root / "files.json", json.dumps(self._digests))
        return str(remembered[2])

    def _step(self, stage: str, key: str) -> Path:
        return self.root / "steps" / f"{stage}-{key[:_SHORT]}"

    def _unit(self, stage: str, key: str) -> Path:
        return self.root / "units" / f"{stage}-{sha256_of_value([stage, key])[: 2 * _SHORT]}.json"


def _read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is none, so that whatever it held is made again."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write_whole(file: Path, text: str) -> None:
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
