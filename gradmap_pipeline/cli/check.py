"""`gradmap check`: whether recipes can run, without running them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..machine.streams import sole_output
from .command_arguments import Overrides, PluginFiles, RunnablePaths, StorePath
from .command_options import plan_recipe
from .ending import endings

if TYPE_CHECKING:
    from ..errors import GradmapError


def check(
    recipes: RunnablePaths,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    plugins: PluginFiles = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="Print what was seen as one JSON object, and nothing else.")] = False,
) -> None:
    """Check recipes without running them: options, wiring, files, and whether steps can work on the model.

    Prints every problem of every file with its place. The model's tensors are not read; a model that is not on this machine is not
    looked at. The exit code is that of the first recipe that has a problem.
    """
    from ..report.reporters import make_reporter

    failures: list[GradmapError] = []
    with sole_output(json) as output:
        reporter = make_reporter(json=json, quiet=True, stream=output)
        with endings(reporter):
            from ..errors import CommandError, GradmapError
            from ..recipe.catalog import load_catalog
            from ..report.check_result import describe_check, print_check
            from ..run.store import Store
            from ..run.verdicts import inspect_once
            from ..text import dump_json

            if len(recipes) > 1 and overrides:
                raise CommandError(f"--set is for one recipe, and {len(recipes)} are named; check them one by one")
            catalog, results = load_catalog(plugins), []
            for recipe in recipes:
                plan, failure = None, None
                try:
                    made, _ = plan_recipe(recipe, overrides, catalog, store)
                    inspect_once(made, Store(store))  # the stages look at the model
                    plan = made
                except GradmapError as error:
                    failure = error
                    failures.append(error)
                if json:
                    results.append(describe_check(recipe, plan, failure))
                elif plan is not None:
                    print_check(recipe, plan)
                elif failure is not None:
                    reporter.error(failure.exit_code, str(failure), failure.where)
            if json:
                print(dump_json({"schema": 1, "recipes": results}), file=output, flush=True)
    if failures:
        sys.exit(failures[0].exit_code)
