"""The arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .command_options import check_device, check_dtype, check_size, check_threads, parse_path, parse_store
from .completion import complete_dtype, complete_recipe_file, complete_stage


def _recipe_argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, parser=parse_path, autocompletion=complete_recipe_file, help=text, show_default=False)


RecipePath = Annotated[Path, _recipe_argument("RECIPE", "Recipe file.")]
RecipePaths = Annotated[list[Path], _recipe_argument("RECIPE...", "Recipe files.")]
RunnablePath = Annotated[Path, _recipe_argument("RECIPE", "Recipe file, or the gradmap.json of an export.")]
RunnablePaths = Annotated[list[Path], _recipe_argument("RECIPE...", "Recipe files, or the gradmap.json of exports.")]
StageName = Annotated[str | None, typer.Argument(autocompletion=complete_stage, help="Stage to describe.", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="STEP.OPTION=VALUE", help="Replace one option of the recipe. Repeatable.")
]
PluginFiles = Annotated[
    list[Path], typer.Option("--plugin", metavar="FILE", parser=parse_path, help="Python file with stages to use. Repeatable.")
]
StorePath = Annotated[
    Path, typer.Option("--store", metavar="FOLDER", parser=parse_store, help="Folder for results, shared by all recipes.")
]
RecordStore = Annotated[
    Path, typer.Option("--store", metavar="FOLDER", parser=parse_path, help="The store whose runs are meant; nothing is written.")
]
DeviceName = Annotated[
    str, typer.Option("--device", callback=check_device, help="cpu, cuda, cuda:1, or auto: the first GPU if there is one.")
]
DtypeName = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        callback=check_dtype,
        autocompletion=complete_dtype,
        help="Type to compute in: float32, bfloat16 or float16; or fp32, bf16, fp16.",
    ),
]
MemorySize = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        callback=check_size,
        help="Memory this process may use, as 3GiB; of the GPU, where there is one. Default: 80 % of what is free.",
        show_default=False,
    ),
]
HostMemorySize = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        metavar="SIZE",
        callback=check_size,
        help="Memory of the machine that this process may use beside a GPU's. Default: 80 % of what is free.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", callback=check_threads, help="CPU threads. Default: all cores.", show_default=False)
]
