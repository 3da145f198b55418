"""`gradmap init`: a recipe for a model, to start from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .command_arguments import DeviceName, DtypeName, HostMemorySize, MemorySize, StorePath, Threads
from .command_options import make_machine, parse_path
from .ending import endings
from .model_argument import open_named


def init(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, `owner/name` of a hub, or builtin:docs-llama.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", parser=parse_path, help="File to write.")] = Path("recipe.yaml"),
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Share of the layers to remove. Default: 0.25.", show_default=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="NAME=VALUE",
            help="Instead of --ratio: parameters=110M, bytes=500MB, max_perplexity_ratio=1.5 or tokens_per_second=40.",
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        bool, typer.Option("--chat", help="Have both models answer prompts, through the chat template where there is one.")
    ] = False,
    quantise: Annotated[
        str | None,
        typer.Option("--quantise", metavar="FORM", help="Quantise what is left: onnx, torchao or gguf.", show_default=False),
    ] = None,
    store: StorePath = Path(".gradmap"),
    device: DeviceName = "auto",
    dtype: DtypeName = "float32",
    memory: MemorySize = None,
    host_memory: HostMemorySize = None,
    threads: Threads = None,
) -> None:
    """Look at a model and this machine, and write a commented recipe that plans without error.

    A file that is there is not overwritten. The model is downloaded if it must be; no weights are read.
    """
    with endings(store=store):
        from ..checkpoint.pretrained import load_tokenizer
        from ..errors import CommandError
        from ..recipe.catalog import load_catalog
        from ..report.console import print_line
        from ..run.size_curve import name_model
        from ..run.starting_recipe import QUANTISATIONS, Start, fit_start, write_starting_recipe
        from ..text import show

        if to.exists():
            raise CommandError(f"--to {str(to)!r} is there already; name another file, or move that one away")
        if quantise is not None and quantise not in QUANTISATIONS:
            raise CommandError(f"--quantise: found {quantise!r}, accepted: {', '.join(QUANTISATIONS)}")
        source = name_model(model)
        graph = open_named(source)
        start = Start(
            model=source,
            title=f"{graph.base.name}: {len(graph.layers)} layers, {graph.count_parameters():,} parameters, {graph.size_bytes:,} B",
            out=f"{Path(model.removeprefix('builtin:')).name}-pruned",
            prune=_read_amount(ratio, target),
            length=min(512, graph.base.default_sequence_length),
            quantisation=quantise,
            answers=answers,
        )
        if sys.stderr.isatty():
            print(show(f"{start.title}; trying what this machine can do with it"), file=sys.stderr, flush=True)
        machine = make_machine(device, dtype, threads, memory, host_memory)
        fitted = fit_start(start, to, load_catalog([]), machine, store)
        with to.open("x", encoding="utf-8") as file:
            file.write(write_starting_recipe(fitted))
        if fitted.among != "any":
            print_line("layers are chosen `among: expressible`, as the config of this model cannot say every removal")
        if not fitted.is_corrected:
            print_line("no correction: this architecture has no place for one")
        if not answers and getattr(load_tokenizer(graph.base.folder), "chat_template", None):
            print_line("this model answers chats: with --chat the recipe has both models answer prompts")
        options = {
            "--device": (device, "auto"),
            "--dtype": (dtype, "float32"),
            "--memory": (memory, None),
            "--host-memory": (host_memory, None),
            "--store": (store, Path(".gradmap")),
            "--threads": (threads, None),
        }
        said = "".join(f" {name} {value}" for name, (value, default) in options.items() if value != default)
        print_line(f"wrote {to}: gradmap plan {to}{said}; gradmap run {to}{said}")


def _read_amount(ratio: float | None, target: str | None) -> dict[str, Any]:
    from ..errors import CommandError
    from ..recipe.yaml_positions import load_yaml
    from ..stages.pruning_target import PruningTarget

    if ratio is not None and target is not None:
        raise CommandError("give --ratio or --target, not both")
    if target is None:
        return {"ratio": 0.25 if ratio is None else ratio}
    name, equals, value = target.partition("=")
    if not equals or name not in PruningTarget.model_fields:
        raise CommandError(
            f"--target: found {target!r}, accepted: {', '.join(f'{field}=VALUE' for field in PruningTarget.model_fields)}"
        )
    return {"target": {name: load_yaml(value, f"--target {target}").data}}
