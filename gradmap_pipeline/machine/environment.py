"""Another Python for stages whose libraries exclude ours: one that the recipe names, or a virtual environment made once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import StageError
from .atomic_folder import atomic_folder, replace_folder
from .digests import sha256_of_value
from .processes import ask_program, explain_end, tie
from .shortages import find_shortage_in

MACHINERY = ("pluggy", "psutil", "pydantic", "safetensors")
"""Distributions that gradmap-pipeline itself needs where a stage runs."""
_PINNED = (*MACHINERY, "torch")
"""Distributions that are installed in the version that is running, unless the stage requires another."""
_RECORD = "environment.json"
_LOG = "pip.log"
_OLDEST = (3, 10)
_PATIENCE = 120.0
"""Seconds that another Python has to say what it is."""
_PROBE = """
import sys
sys.path = [place for place in sys.path if place]  # no module of the current folder
import json
try:
    from importlib.metadata import PackageNotFoundError, version
except ImportError:
    version = None
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
versions = dict((name, find(name)) for name in sys.argv[1:]) if version else {}
print(json.dumps({"python": list(sys.version_info[:2]), "versions": versions}))
"""


@dataclass(frozen=True)
class Environment:
    """What a stage needs of the Python it runs in."""

    requirements: tuple[str, ...]
    """Requirements as pip takes them: `llmcompressor==0.14.0`."""

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
        """Digest of all that decides what a managed environment holds."""
        return sha256_of_value([self.requirements, self.pins, sys.version_info[:2]])


@dataclass(frozen=True)
class Workplace:
    """Where one step runs: in `python`, or in a virtual environment under `root` that holds what `environment` requires."""

    environment: Environment
    root: Path
    """Folder of all managed environments."""
    python: Path | None = None
    """Given by the recipe."""

    @property
    def executable(self) -> Path:
        """The Python to start. A managed one is there after `prepare`."""
        if self.python is not None:
            return find_program(self.python)
        return _executable_in(self._folder)

    def identify(self, libraries: Sequence[str]) -> dict[str, Any]:
        """JSON of what may change a result: versions in a given Python, requirements of a managed one."""
        if self.python is None:
            return {"environment": self.environment.digest}
        return probe(self.executable, (*libraries, *self.environment.distributions))

    def prepare(self, tell: Callable[[str], None]) -> None:
        """Make the environment unless it is there; of a given Python, check that it has what is needed. Raises `StageError`."""
        if self.python is not None:
            check_python(self.executable, self.environment)
        elif not (self._folder / _RECORD).is_file():
            wanted = ", ".join(self.environment.requirements) or "its libraries"
            tell(f"makes a virtual environment with {wanted} in {str(self._folder)!r}; this is done once")
            self._make()

    @property
    def _folder(self) -> Path:
        return self.root / self.environment.digest[:16]

    def _make(self) -> None:
        pins = [f"{name}=={number}" for name, number in self.environment.pins.items()]
        with atomic_folder(self._folder) as draft:
            constraints = draft / "constraints.txt"
            _run([sys.executable, "-m", "venv", str(draft)], self.root / _LOG, "a virtual environment cannot be made")
            constraints.write_text("\n".join(pins) + "\n")
            wanted = [pin for pin in pins if not pin.startswith("torch==")]
            pip = [str(_executable_in(draft)), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            failure = "pip could not install what the stage needs"
            _run([*pip, "-c", str(constraints), *wanted, *self.environment.requirements], self.root / _LOG, failure)
            record = {"requirements": self.environment.requirements, "pins": pins, "python": sys.version}
            (draft / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            replace_folder(draft, self._folder)


def find_program(python: Path) -> Path:
    """Where a program lies that is named by a path, or found on the search path by its name."""
    return Path(shutil.which(python) or python).absolute()


def check_python(python: Path, environment: Environment) -> None:
    """Raise `StageError` unless a program is a Python that has what a stage with this environment needs."""
    from packaging.requirements import Requirement

    wanted = " and ".join(filter(None, (", ".join(MACHINERY), ", ".join(environment.requirements))))
    try:
        versions = probe(python, (*MACHINERY, *environment.distributions))["versions"]
    except StageError as error:
        oldest = ".".join(map(str, _OLDEST))
        advice = f"give the path of a Python {oldest} or later that has {wanted}, as in `run: {{python: venv/bin/python}}`"
        raise StageError(f"{error}; {advice}") from error
    wrong = [f"{name} is missing" for name in MACHINERY if versions[name] is None]
    lacking = [name for name in MACHINERY if versions[name] is None]
    for text in environment.requirements:
        requirement = Requirement(text)
        there = versions[requirement.name]
        if there is None or not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} is {'missing' if there is None else there}, needed: {text}")
            lacking.append(text)
    if wrong:
        command = " ".join([str(python), "-m pip install", *(f"'{name}'" for name in lacking)])
        raise StageError(f"{str(python)!r} lacks what the stage needs ({'; '.join(wrong)}): {command}")


def probe(python: Path, distributions: tuple[str, ...]) -> dict[str, Any]:
    """Ask another Python for its version and those of distributions; None for one that it does not have.

    Raises `StageError` where it is no Python, or is too old.
    """
    answer = _probe(python, distributions)
    if isinstance(answer, str):
        raise StageError(answer)
    return answer


@cache
def _probe(python: Path, distributions: tuple[str, ...]) -> dict[str, Any] | str:
    """What a Python says of itself, or why that is not known; a program that hangs is waited for once."""
    try:
        code, said = ask_program([str(python), "-c", _PROBE, *distributions], _PATIENCE, surroundings())
    except OSError as error:
        return f"{str(python)!r} does not run as a Python: {error.strerror or error}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    answer = next((answer for line in reversed(lines) if (answer := _read_answer(line)) is not None), None)
    if code is None:
        return f"{str(python)!r} does not run as a Python: it has not answered within {_PATIENCE:g} seconds"
    if code or answer is None:
        how = f"it ended with code {code}" if code else "it does not say which Python it is"
        return f"{str(python)!r} does not run as a Python: {lines[-1] if lines else how}"
    if tuple(answer["python"]) < _OLDEST:
        return f"{str(python)!r} is Python {'.'.join(map(str, answer['python']))}"
    return answer


def _read_answer(line: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) and answer.keys() == {"python", "versions"} else None


def surroundings() -> dict[str, str]:
    """Variables for another Python: without those that say where the modules of this one lie."""
    ours = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH")
    return {name: value for name, value in os.environ.items() if name not in ours}


def _executable_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(command: list[str], log: Path, failure: str) -> None:
    """Run a program with its output in a log. Raises `StageError` with the last line of it."""
    with log.open("w") as output:
        code = subprocess.run(
            tie(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")
        if code < 0 or find_shortage_in(said):
            raise explain_end(f"{failure}: {Path(command[0]).name}", code, said, f"; all of its output is in {str(log)!r}")
        lines = [line for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {code}"]
        raise StageError(f"{failure}: {errors[-1].removeprefix('ERROR: ')}; all of its output is in {str(log)!r}")
