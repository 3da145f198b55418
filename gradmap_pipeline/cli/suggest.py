"""`gradmap suggest`: how small a model can get, before a recipe is written."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..machine.streams import sole_output
from .command_arguments import DeviceName, DtypeName, HostMemorySize, MemorySize, PluginFiles, StorePath, Threads
from .command_options import make_machine, open_store, parse_path
from .completion import complete_stage
from .ending import endings
from .model_argument import open_named

if TYPE_CHECKING:
    from ..recipe.catalog import Catalog


def suggest(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, `owner/name` of a hub, or builtin:docs-llama.", show_default=False)
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", metavar="FILE", parser=parse_path, help="Text to rank layers on. Default: Python code.", show_default=False
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out",
            metavar="FILE",
            parser=parse_path,
            help="Text to measure on. Default: other Python code.",
            show_default=False,
        ),
    ] = None,
    ranking: Annotated[
        str, typer.Option("--ranking", metavar="STAGE", autocompletion=complete_stage, help="Stage that ranks the layers.")
    ] = "gradmap_score",
    share: Annotated[float, typer.Option("--share", min=0.01, max=0.9, help="Most layers to remove, as a share of all.")] = 0.5,
    points: Annotated[int, typer.Option("--points", min=1, max=200, help="Depths to measure, besides the whole model.")] = 8,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences to rank on, and to measure on.")] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            "--length", min=2, help="Tokens in a sequence. Default: 512, or what the model is made for.", show_default=False
        ),
    ] = None,
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    host_memory: HostMemorySize = None,
    threads: Threads = None,
    plugins: PluginFiles = [],  # noqa: B006 - typer reads the default
    json: Annotated[bool, typer.Option("--json", help="Print the points as one JSON list, and nothing else.")] = False,
) -> None:
    """Measure a model at several depths, all from one ranking: layers, parameters, bytes, speed and perplexity.

    Nothing is corrected and nothing is written but the store. Interrupted, the same command goes on.
    """
    from ..report.reporters import make_reporter

    with sole_output(json) as output, endings(make_reporter(json=json, quiet=True, stream=output), store):
        from ..recipe.catalog import load_catalog
        from ..recipe.plan import make_plan
        from ..recipe.recipe import read_recipe
        from ..report.curve_table import print_curve
        from ..run.runner import run_plan
        from ..run.size_curve import choose_counts, name_model, read_curve, write_curve_recipe
        from ..text import dump_json

        catalog = load_catalog(plugins)
        _check_ranking(ranking, catalog)
        source = name_model(model)
        graph = open_named(source)
        depth = len(graph.layers)
        counts = choose_counts(max(1, min(round(depth * share), depth - 2)), points)
        texts: list[dict[str, Any]] = [
            {"builtin": builtin} if file is None else {"path": str(file)}
            for file, builtin in ((text, "calibration"), (held_out, "heldout"))
        ]
        amount: dict[str, int] = {"samples": samples, "sequence_length": length or min(512, graph.base.default_sequence_length)}
        recipe = read_recipe(write_curve_recipe(source, ranking, counts, texts[0], texts[1], **amount), Path("suggest"))
        plan = make_plan(recipe, catalog, store)
        machine = make_machine(device, dtype, threads, memory, host_memory)
        state = run_plan(plan, open_store(store), machine, make_reporter(quiet=json, has_tables=False))
        curve = read_curve(state, counts, machine)
        if json:
            print(dump_json([asdict(point) for point in curve]), file=output, flush=True)
        else:
            print_curve(curve, "Python code" if held_out is None else str(held_out), ranking)


def _check_ranking(name: str, catalog: Catalog) -> None:
    """Raise `CommandError` where a stage makes no ranking of which any number of removals can be taken."""
    from ..errors import CommandError
    from ..stages.scoring import LayerScoring

    stage = catalog.find(name)
    if stage is None:  # the plan says which name could be meant
        return
    if not issubclass(stage, LayerScoring):
        raise CommandError(
            f"--ranking: stage {name!r} ranks no layers; name one that does, such as gradmap_score or shortgpt_score"
        )
    if stage.all_or_nothing:
        raise CommandError(f"--ranking: {name!r} chooses layers that go together, and a curve takes them one by one; name another")
