"""What options of the command line accept, and how a wrong one is told."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..recipe.catalog import Catalog
    from ..recipe.plan import Plan
    from ..run.replay import Replay
    from ..run.store import Store

_UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
"""Base of all complaints about arguments; typer has it from click or brings its own."""
_THREADS_A_CORE = 4
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_STORE_HOLDS = {
    "steps",
    "units",
    "runs",
    "environments",
    "uses",
    "files.json",
    "traceback.txt",
    "stage.log",
    "quiet.log",
    "gradmap.log",
    ".gitignore",
}


class CommandGroup(TyperGroup):
    """The commands; a wrong argument is told as every other error is, with exit code 2."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        from .ending import INTERRUPTED, has_told, tell_end

        try:
            code = super().main(args, standalone_mode=False, **extra)
        except _UsageError as error:
            code = _tell_usage(error, sys.argv[1:] if args is None else list(args))
        except typer.Abort:
            code = INTERRUPTED
        if code == INTERRUPTED and not has_told():  # it came between two lines of ours
            tell_end(KeyboardInterrupt())
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _tell_usage(error: Any, arguments: list[str]) -> int:
    from ..errors import CommandError
    from ..report.reporters import make_reporter

    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "gradmap"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return CommandError.exit_code
    reporter = make_reporter(json="--json" in arguments, quiet=True)
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's, where typer asks it
    reporter.error(CommandError.exit_code, f"{message}; see {path} --help", None)
    return CommandError.exit_code


def check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", device):
        raise typer.BadParameter(f"found {device!r}, accepted: auto, cpu, cuda, cuda:1")
    return device


def check_dtype(dtype: str) -> str:
    """The full name of a type."""
    full = _SHORT_DTYPES.get(dtype, dtype)
    if full not in _SHORT_DTYPES.values():
        raise typer.BadParameter(f"found {dtype!r}, accepted: {', '.join(_SHORT_DTYPES.values())}; or {', '.join(_SHORT_DTYPES)}")
    return full


def check_size(size: str | None) -> str | None:
    from ..machine.memory import parse_size

    try:
        if size is not None and parse_size(size) == 0:
            raise ValueError(f"found {size!r}, accepted: a size such as 3GiB, 512MiB or 2.5GB")
        return size
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_threads(threads: int | None) -> int | None:
    most = _THREADS_A_CORE * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise typer.BadParameter(f"found {threads}, accepted: 1 to {most}, {_THREADS_A_CORE} for each core of this machine")
    return threads


def parse_path(text: str | Path) -> Path:
    """A path; an empty one would be the current folder."""
    if not str(text).strip():
        raise typer.BadParameter("is empty; name a file or folder")
    return Path(text)


def parse_text(text: str) -> str:
    """A text that is not empty."""
    if not text.strip():
        raise typer.BadParameter("is empty; leave it out, or name something")
    return text


def parse_output(text: str | Path) -> Path:
    """A folder that is there, or can be made."""
    folder = parse_path(text)
    try:
        above = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
        if not above.is_dir():
            raise typer.BadParameter(f"{str(above if above != folder.absolute() else folder)!r} is not a folder; name a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise typer.BadParameter(f"{str(folder)!r} cannot be written; name another folder")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{str(text)!r} cannot be a folder: {getattr(error, 'strerror', None) or error}") from None
    return folder


def parse_store(text: str | Path) -> Path:
    """A folder that is a store, is empty, or can be made."""
    store = Path(text)
    try:
        if not str(text).strip():
            raise typer.BadParameter("is empty; name a folder")
        above = next(folder for folder in (store.absolute(), *store.absolute().parents) if os.path.lexists(folder))
        if not above.is_dir():
            raise typer.BadParameter(f"{str(above if above != store.absolute() else store)!r} is a file; name a folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise typer.BadParameter(f"{str(store)!r} cannot be written; name another folder")
        held = set(os.listdir(store)) if store.is_dir() else set()
        if held and not held & _STORE_HOLDS:
            raise typer.BadParameter(f"{str(store)!r} holds other things; name a new folder, or one that is a store")
    except OSError as error:
        raise typer.BadParameter(f"{str(text)!r} cannot be a folder: {error.strerror}") from None
    return store


def open_store(folder: Path) -> Store:
    """Make the folder unless it is there. Raises `CommandError` where it cannot be used."""
    from ..errors import CommandError
    from ..machine.shortages import is_shortage
    from ..run.store import Store

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").touch()
    except OSError as error:
        if is_shortage(error):
            raise
        advice = "name a folder that can be written"
        raise CommandError(f"--store {str(folder)!r} cannot be used: {error.strerror}; {advice}") from error
    return Store(folder)


def make_machine(device: str, dtype: str, threads: int | None, memory: str | None, host_memory: str | None) -> Machine:
    """What the options say of this machine."""
    from ..machine.machine import Machine
    from ..machine.memory import parse_size
    from ..machine.supervision import check_address_space

    check_address_space()
    sizes = [None if size is None else parse_size(size) for size in (memory, host_memory)]
    return Machine(device, dtype, threads, *sizes)


def plan_recipe(recipe: Path, overrides: list[str], catalog: Catalog, store: Path) -> tuple[Plan, Replay | None]:
    """The plan of a recipe, or of an export that is made again, with the options of a command; and what is known of that export.

    Raises `RecipeError` with every problem.
    """
    from ..errors import Problem, RecipeError
    from ..recipe.plan import make_plan
    from ..recipe.recipe import load_recipe
    from ..run.replay import is_replay, read_replay

    if not is_replay(recipe):
        return make_plan(load_recipe(recipe, overrides), catalog, store), None
    replay = read_replay(recipe, overrides)
    try:
        return make_plan(replay.recipe, catalog, store), replay
    except RecipeError as error:
        advice = "as in --set model.path=FOLDER or --set calibrate.dataset.path=FILE"
        told = f"models, data and folders that lie elsewhere here are named with --set, {advice}; stages of files with --plugin"
        raise RecipeError([*error.problems, Problem(str(recipe), told)]) from error
