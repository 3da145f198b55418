"""Another Python for stages whose libraries exclude ours: one that the recipe names, or a virtual environment made once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .digests import sha256_of_value
from .errors import StageError
from .partial import partial_folder, replace_folder
from .processes import explain_end, tie
from .shortages import find_shortage_in

MACHINERY = ("pluggy", "psutil", "pydantic", "safetensors")
"""Distributions that gradmap-pipeline itself needs where a stage runs."""
_PINNED = (*MACHINERY, "torch")
"""Distributions that are installed in the version that is running, unless the stage asks for another."""
_RECORD = "environment.json"
_LOG = "pip.log"
_PROBE = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
print(json.dumps({"python": list(sys.version_info[:2]), "versions": {name: find(name) for name in sys.argv[1:]}}))
"""


@dataclass(frozen=True)
class Environment:
    """What a stage needs of the Python it runs in."""

    requirements: tuple[str, ...]
    """As pip takes them: `llmcompressor==0.14.0`."""

    @property
    def pins(self) -> dict[str, str]:
        """Versions of libraries that are taken over from the Python that is running."""
        named = set(self.distributions)
        return {name: version(name).partition("+")[0] for name in _PINNED if name not in named}

    @property
    def distributions(self) -> tuple[str, ...]:
        """Names of what is required."""
        from packaging.requirements import Requirement

        return tuple(Requirement(requirement).name for requirement in self.requirements)

    @property
    def digest(self) -> str:
        """Of all that decides what a managed environment holds."""
        return sha256_of_value([self.requirements, self.pins, sys.version_info[:2]])


@dataclass(frozen=True)
class Workplace:
    """Where one step runs: in `python`, or in a virtual environment under `root` that holds what `environment` asks for."""

    environment: Environment
    root: Path
    """Folder of all managed environments."""
    python: Path | None = None
    """Given by the recipe."""

    @property
    def executable(self) -> Path:
        """The Python to start. A managed one is there after `prepare`."""
        if self.python is not None:
            return Path(shutil.which(self.python) or self.python).absolute()
        return _executable_in(self._folder)

    def identify(self, libraries: Sequence[str]) -> dict[str, Any]:
        """JSON of what may change a result: versions in a given Python, requirements of a managed one."""
        if self.python is None:
            return {"environment": self.environment.digest}
        return probe(self.executable, (*libraries, *self.environment.distributions))

    def prepare(self, tell: Callable[[str], None]) -> None:
        """Make the environment unless it is there; of a given Python, check that it has what is needed. Raises `StageError`."""
        if self.python is not None:
            self._check_given()
        elif not (self._folder / _RECORD).is_file():
            wanted = ", ".join(self.environment.requirements) or "its libraries"
            tell(f"makes a virtual environment with {wanted} in {str(self._folder)!r}; this is done once")
            self._make()

    @property
    def _folder(self) -> Path:
        return self.root / self.environment.digest[:16]

    def _check_given(self) -> None:
        from packaging.requirements import Requirement

        found = probe(self.executable, (*MACHINERY, *self.environment.distributions))["versions"]
        wrong = [f"{name} is missing" for name in MACHINERY if found[name] is None]
        lacking = [name for name in MACHINERY if found[name] is None]
        for text in self.environment.requirements:
            requirement = Requirement(text)
            there = found[requirement.name]
            if there is None or not requirement.specifier.contains(there, prereleases=True):
                wrong.append(f"{requirement.name} is {'missing' if there is None else there}, needed: {text}")
                lacking.append(text)
        if wrong:
            command = " ".join([str(self.python), "-m pip install", *(f"'{name}'" for name in lacking)])
            raise StageError(f"{str(self.python)!r} lacks what the stage needs ({'; '.join(wrong)}): {command}")

    def _make(self) -> None:
        pins = [f"{name}=={number}" for name, number in self.environment.pins.items()]
        with partial_folder(self._folder) as partial:
            constraints = partial / "constraints.txt"
            _run([sys.executable, "-m", "venv", str(partial)], self.root / _LOG, "a virtual environment cannot be made")
            constraints.write_text("\n".join(pins) + "\n")
            wanted = [pin for pin in pins if not pin.startswith("torch==")]
            pip = [str(_executable_in(partial)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            what = "pip could not install what the stage needs"
            _run([*pip, "-c", str(constraints), *wanted, *self.environment.requirements], self.root / _LOG, what)
            record = {"requirements": self.environment.requirements, "pins": pins, "python": sys.version}
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            replace_folder(partial, self._folder)


@cache
def probe(python: Path, distributions: tuple[str, ...]) -> dict[str, Any]:
    """Ask another Python for its version and those of distributions; None for one that it does not have."""
    try:
        done = subprocess.run([str(python), "-c", _PROBE, *distributions], capture_output=True, text=True, check=True, timeout=120)
        found: dict[str, Any] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise StageError(f"{str(python)!r} does not run as a Python: {_last_line(error)}") from error
    if tuple(found["python"]) < (3, 10):
        raise StageError(f"{str(python)!r} is Python {'.'.join(map(str, found['python']))}; stages need 3.10 or later")
    return found


def _executable_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(command: list[str], log: Path, what: str) -> None:
    """Run a program with its output in a log. Raises `StageError` with the last line of it."""
    with log.open("w") as output:
        code = subprocess.run(
            tie(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")
        if code < 0 or find_shortage_in(said):
            raise explain_end(f"{what}: {Path(command[0]).name}", code, said, f"; all of its output is in {str(log)!r}")
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {code}"]
        raise StageError(f"{what}: {errors[-1].removeprefix('ERROR: ')}; all of its output is in {str(log)!r}")


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or getattr(error, "strerror", None) or str(error)
    return str(text).strip().splitlines()[-1] if str(text).strip() else type(error).__name__
