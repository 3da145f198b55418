"""Run an exported model in another program, and keep what came out in docs/consumers.json.

    python tests/consumers_run.py llama.cpp MODEL --name "Gemma 3 270M" --remove 2,5,9 --python PYTHON --converter llama.cpp
    python tests/consumers_run.py mlx-lm MODEL --name "Gemma 3 270M" --remove 2,5,9 --python PYTHON

MODEL is a folder with a Hugging Face model, or `random:gemma2` for the small one of tests/test_llama_cpp.py. PYTHON is one that has
llama-cpp-python or mlx-lm. The model is computed in float32 by this package beside the program, at the last nine positions of
random prompts. A row of the same program, model, layers and format is replaced. `make consumers` turns the file into
docs/consumers.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import test_llama_cpp
from gradmap_plugins.export import ExportModel
from gradmap_plugins.export_gguf import ExportGguf
from gradmap_plugins.quantize_gguf import PLAIN, QuantizeGguf
from walk import make_model

from gradmap_pipeline import ModelGraph
from gradmap_pipeline.checkpoint.architecture import full_config
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import GradmapError, OptionError
from gradmap_pipeline.export.llamacpp import limits, parity
from gradmap_pipeline.export.verify import read_lineage
from gradmap_pipeline.testing import run_stage

DATA = Path(__file__).parent.parent / "docs" / "consumers.json"
SAME = ("program", "architecture", "model", "removed", "format")
"""Keys that make two rows one."""
AGREES = 0.1
"""Nats by which the log-probability of the likeliest token may differ for a row to say `agrees`."""
ALIKE = 0.9
"""Share of positions at which both must find the same token likeliest: small random models have logits that differ little."""


def run_llama_cpp(graph: ModelGraph, folder: Path, asked: argparse.Namespace) -> parity.Parity:
    """Export, run, and quantise where the type is a quantised one."""
    if asked.without_array:
        limits.find_arrays = lambda _: {}
    parity.TOLERANCE = dict.fromkeys(parity.TOLERANCE, float("inf"))
    plain = asked.type if asked.type in parity.TOLERANCE else "f16"
    stage = ExportGguf(to=folder / "gguf", converter=asked.converter, python=asked.python, type=plain)
    exported = run_stage(stage, folder / "export", model=graph).exported
    if plain == asked.type:
        lineage = read_lineage(exported.folder)["llama_cpp"]
        return parity.Parity(**{**lineage, "lengths": tuple(lineage["lengths"])})
    quantising = QuantizeGguf(to=folder / "quantised", type=asked.type, python=asked.python)
    file = run_stage(quantising, folder / "quantise", exported=exported).exported.file
    return parity.measure_parity(graph, file, plain, str(asked.python), 0)


def run_mlx(graph: ModelGraph, folder: Path, asked: argparse.Namespace) -> parity.Parity:
    """Export a Hugging Face folder, and compute its logits with mlx-lm."""
    import numpy as np
    import torch

    run_stage(ExportModel(to=folder / "hf"), folder / "export", model=graph)
    prompts = parity.make_prompts(graph, 1 << 30, 0)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    program = Path(__file__).with_name("mlx_logits.py")
    out = folder / "logits.npy"
    command = [str(asked.python), str(program), str(folder / "hf"), str(folder / "prompts.json"), str(out), str(parity.STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    meant = parity.compute_logits(graph, prompts)
    return parity.compare_logits(meant, torch.from_numpy(np.load(out)), tuple(map(len, prompts)))


PROGRAMS = {"llama.cpp": run_llama_cpp, "mlx-lm": run_mlx}
VERSIONS = {
    "llama.cpp": "import importlib.metadata as m; print('llama-cpp-python ' + m.version('llama-cpp-python'))",
    "mlx-lm": "import importlib.metadata as m; print(m.version('mlx-lm') + ', mlx ' + m.version('mlx'))",
}


def find_model(asked: argparse.Namespace, folder: Path) -> Path:
    """The model's folder; a random one is made, and converted without its tokenizer."""
    if not asked.model.startswith("random:"):
        return Path(asked.model)
    test_llama_cpp.LLAMA_CPP = str(asked.converter.absolute())
    asked.converter = test_llama_cpp.make_converter(folder)
    architecture = asked.model.removeprefix("random:")
    return make_model(folder / "base", architecture, **test_llama_cpp.SIZES, **test_llama_cpp.MODELS[architecture])


def make_row(asked: argparse.Namespace) -> dict[str, Any]:
    """What came out: `agrees`, `computes another model`, `runs quantised`, `refused` or `fails`, with figures or the reason."""
    removed = [int(layer) for layer in asked.remove.split(",") if layer]
    version = subprocess.run([str(asked.python), "-c", VERSIONS[asked.program]], capture_output=True, text=True, check=True)
    written = "safetensors" if asked.program == "mlx-lm" else f"GGUF {asked.type}"
    row = {
        "program": asked.program,
        "version": version.stdout.strip(),
        "model": asked.name,
        "removed": removed,
        "format": f"{written} without the array" if asked.without_array else written,
    }
    with TemporaryDirectory() as folder:
        base = find_model(asked, Path(folder))
        row["architecture"] = full_config(base)["model_type"]
        graph = open_folder(base).without_layers(removed) if removed else open_folder(base)
        try:
            run = PROGRAMS[asked.program](graph, Path(folder), asked)
        except OptionError as error:
            return {**row, "result": "refused", "figure": str(error)}
        except (GradmapError, RuntimeError) as error:
            return {**row, "result": "fails", "figure": str(error)}
    result = "agrees" if run.log_probability_difference < AGREES and run.agreeing >= ALIKE else "computes another model"
    if asked.program == "llama.cpp" and asked.type not in PLAIN:
        result = "runs quantised"
    figure = (
        f"{run.agreeing:.0%} of likeliest tokens at {', '.join(map(str, run.lengths))} tokens; log-probability differs by up "
        f"to {run.log_probability_difference:.2g}, logits by {run.difference:.2g}"
    )
    return {**row, "result": result, "figure": figure}


def keep_row(row: dict[str, Any]) -> None:
    """Add a row to the data file, in place of one of the same run."""
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    rows = [other for other in rows if any(other[key] != row[key] for key in SAME)]
    DATA.write_text(json.dumps([*rows, row], indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("model")
    parser.add_argument("--name", required=True, help="of the model, for the table")
    parser.add_argument("--remove", default="", help="layers, as 2,5,9")
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--converter", type=Path, help="folder of llama.cpp")
    parser.add_argument("--type", default="f16", help="of weights in a GGUF file")
    parser.add_argument("--without-array", action="store_true", help="leave out what export_gguf adds to the converter's file")
    row = make_row(parser.parse_args())
    keep_row(row)
    print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
