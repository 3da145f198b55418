"""The commands and their options. Imports typer alone until one runs, so that `gradmap --help` answers at once."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..machine.streams import sole_output
from .check import check as check_recipes
from .command_arguments import (
    DeviceName,
    DtypeName,
    HostMemorySize,
    MemorySize,
    Overrides,
    PluginFiles,
    RecipePaths,
    RunnablePath,
    StageName,
    StorePath,
    Threads,
)
from .command_options import CommandGroup, make_machine, open_store, parse_output, plan_recipe
from .ending import endings
from .init import init
from .lock import lock
from .material_commands import new_plugin, recipes
from .records import diff, log, show
from .report import report
from .run import run
from .store_commands import store_commands
from .suggest import suggest
from .verify import verify

if TYPE_CHECKING:
    from ..recipe.catalog import Catalog

app = typer.Typer(
    name="gradmap",
    cls=CommandGroup,
    help="Turn a Hugging Face causal LM into a smaller one that still loads everywhere.",
    epilog="Exit codes: 0 done, 2 recipe or command invalid, 3 does not fit this machine, 4 a stage failed, "
    "5 a quality limit is not met, 6 what was computed again differs, 130 interrupted (run the same command to go on).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"gradmap-pipeline {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


app.command()(run)


app.command(name="check")(check_recipes)


@app.command()
def plan(
    recipe: RunnablePath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    host_memory: HostMemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print what each step takes as one JSON object, and nothing else.")] = False,
) -> None:
    """Show what a recipe will do: steps, options, layers left; and what it takes: memory, bytes, operations, time.

    Times come from one layer, tried on this machine with made-up weights. Exit code 3: a step does not fit.
    """
    from ..report.reporters import make_reporter

    with sole_output(json) as output:
        with endings(make_reporter(json=json, quiet=True, stream=output), store):
            from ..recipe.catalog import load_catalog
            from ..report.console import print_line
            from ..report.cost_table import costs_as_json, print_costs
            from ..report.plan_table import print_plan
            from ..run.costs import estimate_plan
            from ..run.listening import heard

            planned, _ = plan_recipe(recipe, overrides, load_catalog(plugins), store)
            if not json:
                print_plan(planned)
                if sys.stderr.isatty():
                    print("trying a layer of each kind on this machine", file=sys.stderr, flush=True)
            machine = make_machine(device, dtype, threads, memory, host_memory)
            with heard(lambda text: None if json else print_line(f"note: {text}", output)):
                costs = estimate_plan(planned, machine, store)
            if json:
                print(costs_as_json(costs), file=output, flush=True)
            else:
                print_costs(costs)
        with endings(make_reporter(quiet=True)):  # the one JSON object holds the obstacles
            from ..errors import CapacityError

            if costs is not None and costs.obstacles:
                raise CapacityError("\n".join(costs.obstacles))


@app.command()
def compare(
    recipes: RecipePaths,
    grids: Annotated[
        list[str], typer.Option("--grid", metavar="STEP.OPTION=A,B,C", help="Try each value. Repeatable: all combinations.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", parser=parse_output, help="Folder for the table and the plot.")
    ] = Path("out/comparison"),
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    host_memory: HostMemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
) -> None:
    """Run several recipes, or one over a grid of options, and put them into one table and one plot.

    What they share is computed once. Steps that write folders are left out. A variant that fails does not stop the others.
    """
    with endings(store=store):
        from ..recipe.places import find_machine_places
        from ..report.comparison_files import print_comparison, save_comparison
        from ..report.console import print_line
        from ..report.reporters import CompareReporter
        from ..run.comparison import check_folder, make_variants, run_variants

        catalog = _catalog(plugins)
        variants = make_variants(recipes, grids, overrides, catalog, store)
        check_folder(out, variants, [place for recipe in recipes for place in find_machine_places(store, recipe, plugins)])
        left_out = sorted({step for variant in variants for step in variant.left_out})
        if left_out:
            print_line(f"left out, as variants would write over each other: {', '.join(left_out)}")
        reporter = CompareReporter([variant.name for variant in variants])
        comparison = run_variants(variants, open_store(store), make_machine(device, dtype, threads, memory, host_memory), reporter)
        print_comparison(comparison)
        for line in save_comparison(comparison, out):
            print_line(line)
        for name, error in comparison.failures:
            reporter.error(error.exit_code, f"{name}: {error}", error.where)
    if comparison.failures:
        sys.exit(comparison.failures[0][1].exit_code)


@app.command()
def stages(
    name: StageName = None,
    plugins: PluginFiles = [],  # noqa: B006
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="STAGE|FILE",
            help="Run a stage, or those of a Python file, on the built-in model, and say what breaks the contract of stages.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="STAGE.OPTION=VALUE", help="With --check: an option of the stage. Repeatable.")
    ] = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print all that is known of the stages as one JSON list.")] = False,
) -> None:
    """List the stages that recipes can use, describe one, or check whether one keeps the contract."""
    from ..report.reporters import make_reporter

    with sole_output(json) as output, endings(make_reporter(json=json, quiet=True, stream=output)):
        from ..report.stage_help import describe_stage, list_stages, print_json

        if check is not None:
            from ..testing.stage_check import check_stages

            check_stages(check, plugins, overrides, json=json)
            return
        catalog = _catalog(plugins)
        if json:
            print_json(catalog, name, output)
            return
        print(list_stages(catalog) if name is None else describe_stage(catalog, name))


app.command()(verify)
app.command()(report)
app.command()(lock)
app.command(name="log")(log)
app.command()(show)
app.command()(diff)


@app.command()
def schema(plugins: PluginFiles = []) -> None:  # noqa: B006
    """Print the JSON Schema of recipes, for editors."""
    with sole_output() as output, endings():
        from ..recipe.schema import make_schema
        from ..text import dump_json

        print(dump_json(make_schema(_catalog(plugins)), indent=2), file=output, flush=True)


app.command()(recipes)
app.command()(init)
app.command()(suggest)
app.command(name="new-plugin")(new_plugin)
app.add_typer(store_commands, name="store")


def run_command() -> int:
    """Run the command that the arguments name; return its exit code."""
    from ..machine.memory import prefer_huge_pages

    prefer_huge_pages()
    for talkative in ("torchao", "torch.utils._pytree"):  # what they say when transformers imports them is for their developers
        logging.getLogger(talkative).setLevel(logging.ERROR)
    code = app(standalone_mode=False)
    return code if isinstance(code, int) else 0


def _catalog(plugins: list[Path]) -> Catalog:
    from ..recipe.catalog import load_catalog

    return load_catalog(plugins)
