"""The command line. Imports typer alone until a command runs, so that `gradmap --help` answers at once."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import _exit, environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from .catalog import Catalog
    from .machine import Machine
    from .plan import Plan
    from .report.events import Reporter

app = typer.Typer(
    name="gradmap",
    help="Turn a Hugging Face causal LM into a smaller one that still loads everywhere.",
    epilog="Exit codes: 0 done, 2 recipe or command invalid, 3 does not fit this machine, 4 a stage failed, "
    "5 a quality limit is not met, 130 interrupted (run the same command to go on).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Replace one option of the recipe. Repeatable.")
]
PluginFiles = Annotated[list[Path], typer.Option("--plugin", metavar="FILE", help="Python file with stages to use. Repeatable.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gradmap-pipeline {version('gradmap-pipeline')}")
        raise typer.Exit


def _check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"found {device!r}, accepted: auto, cpu, cuda, cuda:1")
    return device


def _check_size(size: str | None) -> str | None:
    from .memory import parse_size

    try:
        if size is not None and parse_size(size) == 0:
            raise ValueError("found 0, accepted: a size such as 3GiB, 512MiB or 2.5GB")
        return size
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _check_store(store: Path) -> Path:
    if store.exists() and not store.is_dir():
        raise typer.BadParameter(f"{str(store)!r} is a file; name a folder")
    return store


StorePath = Annotated[Path, typer.Option("--store", callback=_check_store, help="Folder for results, shared by all recipes.")]
DeviceName = Annotated[
    str, typer.Option("--device", callback=_check_device, help="cpu, cuda, cuda:1, or auto: the first GPU if there is one.")
]
DtypeName = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Type to compute in.")]
MemorySize = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        callback=_check_size,
        help="Memory this process may use, as 3GiB; of the GPU, where there is one. Default: 80 % of what is free.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.", show_default=False)]


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line on standard output, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Run a recipe. Steps whose results are in the store are not run again."""
    from .report.reporters import make_reporter

    leads = environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one reports
    reporter = make_reporter(json=json and leads, quiet=quiet or not leads)
    with _errors(reporter):
        plan = _plan(recipe, overrides, plugins)
        from .group import open_group
        from .runner import run_plan
        from .store import Store

        machine = _machine(device, dtype, threads, memory)
        with open_group(device) as group:
            run_plan(plan, Store(store), machine, reporter, group)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = [], plugins: PluginFiles = []) -> None:  # noqa: B006
    """Check a recipe without running it: options, wiring, files. Prints every problem with its place."""
    with _errors():
        plan = _plan(recipe, overrides, plugins)
        typer.echo(f"{recipe}: no problems in {len(plan.steps)} steps")


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print what each step takes as one JSON object, and nothing else.")] = False,
) -> None:
    """Show what a recipe will do: steps, options, layers left; and what it takes: memory, bytes, operations, time.

    Times come from one layer, tried on this machine with made-up weights. Exit code 3: a step does not fit.
    """
    with _errors():
        planned = _plan(recipe, overrides, plugins)
        from .report.plan_table import print_plan

        if not json:
            print_plan(planned)
        from .costs import estimate_plan
        from .errors import CapacityError
        from .report.cost_table import costs_as_json, print_costs

        costs = estimate_plan(planned, _machine(device, dtype, threads, memory), store)
        if json:
            typer.echo(costs_as_json(costs))
        else:
            print_costs(costs)
        if costs is not None and costs.obstacles:
            raise CapacityError("\n".join(costs.obstacles))


@app.command()
def compare(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe files.", show_default=False)],
    grids: Annotated[
        list[str], typer.Option("--grid", metavar="STEP.OPTION=A,B,C", help="Try each value. Repeatable: all combinations.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[Path, typer.Option("--out", help="Folder for the table and the plot.")] = Path("out/comparison"),
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
) -> None:
    """Run several recipes, or one over a grid of options, and put them into one table and one plot.

    What they share is computed once. Steps that write folders are left out. A variant that fails does not stop the others.
    """
    with _errors():
        from .comparison import make_variants, run_variants
        from .report.comparison_files import print_comparison, save_comparison
        from .report.reporters import CompareReporter
        from .store import Store

        variants = make_variants(recipes, grids, overrides, _catalog(plugins))
        left_out = sorted({step for variant in variants for step in variant.left_out})
        if left_out:
            typer.echo(f"left out, as variants would write over each other: {', '.join(left_out)}")
        reporter = CompareReporter([variant.name for variant in variants])
        comparison = run_variants(variants, Store(store), _machine(device, dtype, threads, memory), reporter)
        print_comparison(comparison)
        for line in save_comparison(comparison, out):
            typer.echo(line)
        for name, error in comparison.failures:
            reporter.error(error.exit_code, f"{name}: {error}", error.where)
        if comparison.failures:
            sys.exit(comparison.failures[0][1].exit_code)


@app.command()
def stages(
    name: Annotated[str | None, typer.Argument(help="Stage to describe.", show_default=False)] = None,
    plugins: PluginFiles = [],  # noqa: B006
) -> None:
    """List the stages that recipes can use, or describe one."""
    with _errors():
        from .report.stage_help import describe_stage, list_stages

        catalog = _catalog(plugins)
        typer.echo(list_stages(catalog) if name is None else describe_stage(catalog, name))


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="An exported folder.", show_default=False)]) -> None:
    """Check an exported folder: every file as it was written, and the model loads."""
    with _errors():
        from .verify import verify_folder

        for line in verify_folder(folder):
            typer.echo(line)


@app.command()
def schema(plugins: PluginFiles = []) -> None:  # noqa: B006
    """Print the JSON Schema of recipes, for editors."""
    with _errors():
        import json

        from .schema import make_schema

        typer.echo(json.dumps(make_schema(_catalog(plugins)), indent=2))


def main() -> None:
    """Entry point of the `gradmap` command."""
    from .memory import prefer_huge_pages

    prefer_huge_pages()
    for talkative in ("torchao", "torch.utils._pytree"):  # what they say when transformers imports them is for their developers
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as end:
        if "TORCHELASTIC_RUN_ID" not in environ:
            raise
        # Threads of the communication library may outlive the interpreter, and abort a process that has done its work.
        sys.stdout.flush()
        sys.stderr.flush()
        _exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _catalog(plugins: list[Path]) -> Catalog:
    from .catalog import load_catalog

    return load_catalog(plugins)


def _machine(device: str, dtype: str, threads: int | None, memory: str | None) -> Machine:
    from .machine import Machine
    from .memory import parse_size

    return Machine(device, dtype, threads, None if memory is None else parse_size(memory))


def _plan(recipe: Path, overrides: list[str], plugins: list[Path]) -> Plan:
    from .plan import make_plan
    from .recipe import load_recipe

    return make_plan(load_recipe(recipe, overrides), _catalog(plugins))


@contextmanager
def _errors(reporter: Reporter | None = None) -> Iterator[None]:
    """Print what went wrong, and exit with its code."""
    from .errors import GradmapError
    from .report.reporters import LineReporter

    told = reporter or LineReporter()
    try:
        yield
    except GradmapError as error:
        if not error.agreed or environ.get("RANK", "0") == "0":
            told.error(error.exit_code, str(error), error.where)
        sys.exit(error.exit_code)
    except OSError as error:
        told.error(4, f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", None)
        sys.exit(4)
    except KeyboardInterrupt:
        told.error(130, "interrupted; what is finished is kept: run the same command to go on", None)
        sys.exit(130)
