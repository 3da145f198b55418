"""What a correction and training recover of a third of the layers removed, in domain and out of it.

    python tests/benchmarks/recovery.py WORK OTHER [--model docs=FOLDER:CALIBRATION:HELDOUT] [--set STAGE.OPTION=VALUE ...]

The built-in model, or that of a folder with its texts; OTHER is a text out of domain. One line a model and step goes to
standard output: perplexity in domain, out of it, the shares of the gap in log-perplexity that is closed, seconds. One thread.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from quality import LENGTH, Text

from gradmap_pipeline import DatasetSource, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.testing import run_stage

SAMPLES = 128
SEQUENCES = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--ratio", type=float, default=0.33)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", default="project_compensate,refit_layers", help="stages after prune, in order")
    parser.add_argument("--set", action="append", default=[], dest="options")
    given = parser.parse_args()
    name, _, place = given.model.partition("=")
    if place:
        folder, calibration, heldout = place.split(":")
        graph = open_folder(Path(folder))
        text, inside = DatasetSource(path=Path(calibration)), DatasetSource(path=Path(heldout))
    else:
        graph = open_folder(BUILTIN_FOLDER)
        text, inside = DatasetSource(builtin="calibration"), DatasetSource(builtin="heldout")
    options: dict[str, dict[str, Any]] = {}
    for option in given.options:
        target, _, value = option.partition("=")
        stage, _, field = target.partition(".")
        options.setdefault(stage, {})[field] = yaml.safe_load(value)
    texts = [Text(graph, source, SEQUENCES) for source in (inside, DatasetSource(path=given.other))]
    catalog = load_catalog()

    def run(stage: str, number: int, more: dict[str, Any], **inputs: Any) -> Any:
        made = catalog.stages[stage].model_validate({**more, **options.get(stage, {})})
        return run_stage(made, given.work / f"{name}-{number}-{stage}", seed=given.seed, **inputs)

    dense = [math.log(one.read(graph).perplexity) for one in texts]
    print(name, "dense", *(f"{math.exp(loss):.3f}" for loss in dense), flush=True)
    drawn = {"dataset": text.model_dump(exclude_unset=True), "samples": SAMPLES, "sequence_length": LENGTH}
    calibration_set = run("calibrate", 0, drawn, model=graph).calibration
    scores = run("gradmap_score", 1, {"ratio": given.ratio}, model=graph, calibration=calibration_set).scores
    model: ModelGraph = run("prune", 2, {"ratio": given.ratio}, model=graph, scores=scores).model
    pruned = [math.log(one.read(model).perplexity) for one in texts]
    print(name, "pruned", *(f"{math.exp(loss):.3f}" for loss in pruned), model.removed, flush=True)
    for number, stage in enumerate(given.steps.split(","), start=3):
        started = time.perf_counter()
        model = run(stage, number, {}, model=model, calibration=calibration_set).model
        seconds = time.perf_counter() - started
        losses = [math.log(one.read(model).perplexity) for one in texts]
        closed = [(p - loss) / (p - d) for p, loss, d in zip(pruned, losses, dense, strict=True)]
        figures = [*(f"{math.exp(loss):.3f}" for loss in losses), *(f"{share:.1%}" for share in closed)]
        print(name, stage, *figures, f"{seconds:.0f} s", *given.options, flush=True)


if __name__ == "__main__":
    main()
