"""`gradmap run`: a recipe, or an export by its `gradmap.json`, from its first step to its last."""

from __future__ import annotations

from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..machine.launch import is_leading
from ..machine.streams import sole_errors, sole_output
from .command_arguments import (
    DeviceName,
    DtypeName,
    HostMemorySize,
    MemorySize,
    Overrides,
    PluginFiles,
    RunnablePath,
    StorePath,
    Threads,
)
from .command_options import make_machine, open_store, plan_recipe
from .ending import endings, tell_end

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..recipe.plan import Plan
    from ..run.events import Reporter
    from ..run.replay import Replay
    from ..run.store import Store


def run(
    recipe: RunnablePath,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    host_memory: HostMemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse to run where anything is another than RECIPE.lock says; see gradmap lock.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify-determinism", help="Run each step once more and compare to the bit; exit code 6 where it differs."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line on standard output, and nothing else.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but errors; what others print is in the store's quiet.log.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every note; gradmap.log in the store has them all.")
    ] = False,
) -> None:
    """Run a recipe. Steps whose results are in the store are not run again.

    The gradmap.json of an export is run as the recipe that made it, into folders that end in -again; exit code 6 where their
    files differ from it. gradmap log lists what was run.
    """
    from ..report.log_file import LoggingReporter
    from ..report.reporters import make_reporter

    leads = is_leading(environ)  # of the processes that a launcher started, one reports
    log = store / "quiet.log" if leads else None
    with sole_errors(log, is_wanted=quiet), sole_output(json or quiet) as output:
        reporter = make_reporter(json=json and leads, quiet=quiet or not leads, verbose=verbose, stream=output)
        reporter = LoggingReporter(reporter, store / "gradmap.log") if leads else reporter
        with endings(reporter, store):
            from ..machine.distributed import open_group
            from ..recipe.catalog import load_catalog
            from ..run.runner import run_plan
            from ..run.verdicts import describe_seen, keep_seen

            with open_group(device, lambda error: tell_end(error, reporter, store)) as group:
                plan, replay = plan_recipe(recipe, overrides, load_catalog(plugins), store)
                machine = make_machine(device, dtype, threads, memory, host_memory)
                opened = open_store(store)
                differences: list[str] = []
                if locked or replay is not None:
                    plan, machine, differences = _compare(plan, machine, opened, reporter, replay, is_locked=locked, leads=leads)
                seen = describe_seen(plan) if leads else None
                state = run_plan(plan, opened, machine, reporter, group, is_recorded=True, is_verified=verify)
                if leads and not state.finished[0].cached:  # so that the stages of all steps have looked at the model
                    keep_seen(plan, opened, seen, state.answers)
                if replay is not None and leads:
                    reporter.note("", replay.check_result(plan, state, differences))


def _compare(
    plan: Plan, machine: Machine, store: Store, reporter: Reporter, replay: Replay | None, *, is_locked: bool, leads: bool
) -> tuple[Plan, Machine, list[str]]:
    """The plan and machine as they are locked, and what is another this time. Refuses that where `is_locked`."""
    from ..run.lock_file import apply_lock, check_lock, name_lock, read_lock, refuse

    if replay is None:
        file = name_lock(plan.recipe_path)
        lock = read_lock(file)
        plan, machine = apply_lock(plan, machine, lock)
        described = lock.describe()
        advice = f"make it as it was, or lock the recipe again with `gradmap lock {plan.recipe_path}`"
    else:
        file, described = replay.file, replay.provenance
        machine = replay.use_threads(machine)
        advice = "make it as it was, or run it without --locked to see what comes out"
    if not leads:
        return plan, machine, []
    differences, about_processor = check_lock(plan, machine, store, described, str(file))
    if is_locked:
        refuse(differences, str(file), advice)
    for line in filter(None, (*differences, about_processor)):
        reporter.note("", line)
    return plan, machine, differences
