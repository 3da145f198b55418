"""`gradmap lock`: write down all that decides the bytes of what a recipe comes to."""

from __future__ import annotations

from pathlib import Path

from .command_arguments import (
    DeviceName,
    DtypeName,
    Overrides,
    PluginFiles,
    RecipePath,
    StorePath,
    Threads,
)
from .command_options import make_machine, open_store, plan_recipe
from .ending import endings


def lock(
    recipe: RecipePath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
) -> None:
    """Write RECIPE.lock: versions, code, options, and the commits and digests of model and data. Nothing is run.

    gradmap run --locked then refuses to run where anything is another. The model is downloaded if it must be.
    """
    with endings(store=store):
        from ..errors import CommandError
        from ..recipe.catalog import load_catalog
        from ..report.console import print_line
        from ..run.lock_file import make_lock, name_lock, write_lock

        plan, replay = plan_recipe(recipe, overrides, load_catalog(plugins), store)
        if replay is not None:
            raise CommandError(f"{str(recipe)!r} says itself what it was made with; gradmap run --locked {recipe} goes by it")
        opened = open_store(store)
        opened.prepare()
        file = name_lock(recipe)
        made = make_lock(plan, make_machine(device, dtype, threads, None, None), opened)
        write_lock(file, made)
        opened.close()
        names = ", ".join(f"{name} {version}" for name, version in made.libraries.items())
        print_line(f"wrote {file}: {plan.model.name}, {len(made.steps)} steps, Python {made.python}, {names}")
