"""Results on disk: finished steps by key, and finished units of long steps. A folder that exists is complete."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..artifacts import Artifact, TensorFile
from ..errors import StageError, first_line
from ..machine.atomic_folder import atomic_folder, clear_unfinished_folders, replace_folder, write_file
from ..machine.digests import sha256_of, sha256_of_value
from .output_checks import dump_outputs
from .run_files import find_latest, read_run
from .store_files import DIGEST, is_own_file, read_object, remove_unless, with_digest
from .store_uses import RunningUses, touch

if TYPE_CHECKING:
    import torch

_OUTPUTS = "outputs.json"
_TENSORS = ".safetensors"
_SHORT = 16  # hexadecimal digits of a key in a folder's name
_UNSETTLED_NS = 2 * 10**9
"""A file that has just changed may change again within one tick of its file system's clock, and keep its time."""


@dataclass(frozen=True)
class StepFolder:
    """A step's folder while the step runs, and the place it gets when the step has finished."""

    path: Path
    final: Path


class Store:
    """A folder of results, shared by all recipes that use it.

    steps/<stage>-<key>/outputs.json and tensors     units/<stage>-<key>.json (and .safetensors, of steps at work)
    files.json (digests of files elsewhere)     runs/<start>-<id>.json (a record of each run)
    traceback.txt (of the latest stage that failed unexpectedly)
    environments/<digest>/ (virtual environments of stages that need one)     stage.log (what the latest such stage printed)
    uses/ (what runs use: see `store_uses`)     gradmap.log (what the latest run told, every note among it)
    quiet.log (what others than this program printed in the latest run under --quiet)

    Whatever is read is compared with its digest first. What does not fit counts as not there, so it is made again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._digests: dict[str, Any] | None = None
        self._whole: set[tuple[Path, str]] = set()
        """Files of the store that had their digest when they were read in this process."""
        self.saved: set[str] = set()
        """Keys of the units of work that were saved since the store was opened."""
        self._uses = RunningUses(self.root)
        self._drafts: Path | None = None
        self._resources = ExitStack()
        weakref.finalize(self, self._resources.close)

    def prepare(self, recipe: Path | None = None, stages: Sequence[str] = ()) -> None:
        """Make the folder, keep it out of git, and clear away what killed runs left.

        `recipe`, `stages`: what is about to run. Until `close`, `gradmap store gc` leaves what it uses.
        """
        for name in ("steps", "units", "runs", "environments", "uses"):
            remove_unless(Path.is_dir, self.root / name)
            (self.root / name).mkdir(parents=True, exist_ok=True)
        ignore = self.root / ".gitignore"
        remove_unless(is_own_file, ignore)
        if not ignore.exists() or not ignore.stat().st_size:
            ignore.write_text("*\n")
        for folder in (self.root, self.root / "steps", self.root / "environments"):
            clear_unfinished_folders(folder)
        if recipe is not None:
            self._uses.start(recipe, stages)

    @property
    def environments(self) -> Path:
        """Folder of the virtual environments."""
        return self.root / "environments"

    @property
    def log(self) -> Path:
        """File for what a stage in another Python prints."""
        return self.root / "stage.log"

    def load(self, stage: str, key: str, outputs: type[BaseModel]) -> BaseModel | None:
        """Outputs of a finished step, or None when there is none, or when a file of theirs is gone or not as it was written."""
        self._uses.note([self._step(stage, key)])
        return self._load_from(self._step(stage, key), key, outputs)

    def _load_from(self, folder: Path, key: str, outputs: type[BaseModel]) -> BaseModel | None:
        record = read_object(folder / _OUTPUTS)
        if record.get("key") != key:
            return None
        try:
            result = outputs.model_validate(record.get("outputs"), context={"store": self.root})
        except ValueError:
            return None
        files = _files_of(result)
        self._uses.note(files)  # some may lie in the folders of earlier steps
        return result if all(self._is_whole(path, digest) for path, digest in files.items()) else None

    def _is_whole(self, file: Path, digest: str) -> bool:
        """Whether a file has this digest. One inside the store is read once in a process, so damage of the disk is noticed too."""
        try:
            if not file.is_relative_to(self.root):
                return self.digest_of(file) == digest
            if (file, digest) not in self._whole and file.is_file() and sha256_of(file) == digest:
                self._whole.add((file, digest))
        except OSError:
            return False
        return (file, digest) in self._whole

    @contextmanager
    def step(self, stage: str, key: str) -> Iterator[StepFolder]:
        """A new, empty folder for a step; it vanishes unless `finish` is called."""
        final = self._step(stage, key)
        with atomic_folder(final) as path:
            yield StepFolder(path, final)

    def finish(self, folder: StepFolder, key: str, record: dict[str, Any], outputs: BaseModel) -> BaseModel:
        """Write the outputs and move the folder into place, as the last thing. Returns the outputs as stored.

        Where another run has finished the same step meanwhile, its result stays: somebody may be reading it. Raises
        `StageError` where the outputs cannot be stored.
        """
        dumped = dump_outputs(outputs, self.root)
        described = json.loads(json.dumps({"key": key, **record}, allow_nan=False))
        inside, final = (json.dumps(str(path.relative_to(self.root)))[1:-1] for path in (folder.path, folder.final))
        stored = json.loads(dumped.replace(f'"{inside}/', f'"{final}/'))
        content = with_digest({**described, "outputs": stored})
        (folder.path / _OUTPUTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        finished = self._load_from(folder.final, key, type(outputs))
        if finished is not None:
            return finished
        remove_unless(lambda path: path.is_dir() and not path.is_symlink(), folder.final)
        replace_folder(folder.path, folder.final)
        self._whole = {(path, digest) for path, digest in self._whole if not path.is_relative_to(folder.final)}
        return type(outputs).model_validate(stored, context={"store": self.root})

    def find_loss(self, folder: StepFolder) -> str | None:
        """What somebody has deleted while a step ran, and what to do; None where all is there."""
        gone = next((path for path in (self.root, folder.path) if not path.is_dir()), None)
        if gone is None:
            return None
        place = "the store" if gone == self.root else "the folder of the step in the making,"
        who = "by its stage or by another program"
        return f"{place} {str(gone)!r} was deleted while the step ran, {who}; nothing of it is kept: run again"

    def folder_of(self, stage: str, key: str) -> Path:
        """Where a finished step is."""
        return self._step(stage, key)

    def seconds_of(self, stage: str, key: str) -> float:
        """What a finished step took when it ran, with the units it found finished."""
        return float(read_object(self._step(stage, key) / _OUTPUTS).get("seconds", 0.0))

    def peak_of(self, stage: str, key: str) -> int | None:
        """The most memory that the process had held when a step finished, in bytes; None: not known."""
        peak = read_object(self._step(stage, key) / _OUTPUTS).get("peak_bytes")
        return peak if isinstance(peak, int) else None

    def save_run(self, file: Path, text: str) -> None:
        """Keep the record of a run, as `dump_run` writes it."""
        self._write(file, text)

    def load_run(self, recipe: Path | None = None) -> dict[str, Any] | None:
        """The record of the latest run that came to figures, of any recipe or of that in this file; None where there is none."""
        run = find_latest(self.root, recipe)
        return None if run is None else read_run(run)

    def load_unit(self, stage: str, key: str) -> dict[str, Any] | None:
        """A finished unit of work: `value` (JSON) and the `seconds` it took; or None."""
        unit = read_object(self._unit(stage, key))
        touch(self._unit(stage, key))
        return {name: unit[name] for name in ("value", "seconds")} if unit.get("key") == key else None

    def save_unit(self, stage: str, key: str, value: Any, seconds: float) -> None:
        """Keep a unit of work, even if its step does not finish. Raises `StageError` where the value is not JSON."""
        try:
            text = json.dumps({"key": key, "value": value, "seconds": seconds}, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise StageError(
                f"a value that it wants remembered cannot be stored: {first_line(error) or type(error).__name__}"
            ) from error
        self._write(self._unit(stage, key), json.dumps(with_digest(json.loads(text))))
        self.saved.add(key)

    def load_tensors(self, stage: str, key: str) -> tuple[dict[str, torch.Tensor], float] | None:
        """The tensors of a finished unit, and the seconds it took; None where there are none as they were written."""
        unit, file = self.load_unit(stage, key), self._unit(stage, key).with_suffix(_TENSORS)
        try:
            if unit is None or not is_own_file(file) or sha256_of(file) != unit["value"]:
                return None
        except OSError:
            return None
        return TensorFile(path=file, sha256=unit["value"]).load(), unit["seconds"]

    def save_tensors(self, stage: str, key: str, tensors: dict[str, torch.Tensor], seconds: float) -> None:
        """Keep the tensors of a finished unit of work, until `drop_tensors`."""
        file = self._unit(stage, key).with_suffix(_TENSORS)
        draft = self._open_drafts() / file.name
        written = TensorFile.save(tensors, draft)
        remove_unless(is_own_file, file)
        draft.replace(file)
        self.save_unit(stage, key, written.sha256, seconds)

    def drop_tensors(self, stage: str, key: str) -> None:
        """Forget the tensors of a unit."""
        for file in (self._unit(stage, key), self._unit(stage, key).with_suffix(_TENSORS)):
            file.unlink(missing_ok=True)

    def hold_folder(self, stage: str, key: str) -> Path:
        """A folder of this process alone for work under way, with what an earlier run left in it.

        Where another process works under the same key, the folder is a new one of this run.
        """
        from filelock import FileLock, Timeout

        folder = self._unit(stage, key).with_suffix("")
        lock = FileLock(folder.with_suffix(".lock"), blocking=False)
        try:
            self._resources.enter_context(lock)
        except Timeout:
            return self._resources.enter_context(atomic_folder(self.root / "drafts"))
        remove_unless(lambda path: path.is_dir() and not path.is_symlink(), folder)
        folder.mkdir(exist_ok=True)
        return folder

    def drop_folder(self, folder: Path) -> None:
        """Delete a folder that this process holds."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)

    def save_traceback(self, text: str) -> Path:
        """Keep the traceback of the latest failure for whoever wrote the stage."""
        file = self.root / "traceback.txt"
        self._write(file, text)
        return file

    def digest_of(self, file: Path) -> str:
        """SHA-256 of a file, remembered as long as the system says that nobody has touched it.

        The system sets the time of the latest change of a file's data or attributes (ctime) itself. Programs that keep a
        file's size and time of modification cannot keep that one.
        """
        resolved = file.resolve()
        if self._digests is None:
            self._digests = read_object(self.root / "files.json")
        status = resolved.stat()
        state = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        remembered = self._digests.get(str(resolved))
        if isinstance(remembered, list) and remembered[:-1] == state:
            return str(remembered[-1])
        is_settled = max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - _UNSETTLED_NS
        digest = sha256_of(resolved)
        if is_settled:
            self._digests[str(resolved)] = [*state, digest]
            content = {name: value for name, value in self._digests.items() if name != DIGEST}
            self._write(self.root / "files.json", json.dumps(with_digest(content)))
        return digest

    def close(self, *, is_complete: bool = False) -> None:
        """Leave nothing behind but results. `is_complete`: the run has come to the end of its recipe."""
        self._uses.close(is_complete=is_complete)
        self._resources.close()
        self._drafts = None

    def _write(self, file: Path, text: str) -> None:
        remove_unless(is_own_file, file)
        write_file(file, text, self._open_drafts())

    def _open_drafts(self) -> Path:
        if self._drafts is None or not self._drafts.is_dir():
            self._drafts = self._resources.enter_context(atomic_folder(self.root / "drafts"))
        return self._drafts

    def _step(self, stage: str, key: str) -> Path:
        return self.root / "steps" / f"{stage}-{key[:_SHORT]}"

    def _unit(self, stage: str, key: str) -> Path:
        return self.root / "units" / f"{stage}-{sha256_of_value([stage, key])[: 2 * _SHORT]}.json"


def _files_of(outputs: BaseModel) -> dict[Path, str]:
    """SHA-256 by path of all files that artifacts among the outputs rest on."""
    artifacts = [getattr(outputs, name) for name in type(outputs).model_fields]
    return {path: digest for value in artifacts if isinstance(value, Artifact) for path, digest in value.files_by_path().items()}
