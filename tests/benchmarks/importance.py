"""Draw the importance of the layers of models, by several rankings: `importance.py FILE.svg --model NAME=FOLDER:CALIBRATION`.

`--model` may be repeated. Each model has a panel, and each ranking a line: the scores of its first decision, over the largest of
them. The scores are printed, too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peers import SELECTIONS

from gradmap_pipeline import DatasetSource
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.testing import run_stage

RANKINGS = ("gradmap", "look ahead", "shortgpt", "taylor")


def score_layers(folder: Path, text: Path, samples: int, length: int, dtype: str) -> dict[str, dict[int, float]]:
    """Scores of the first decision, by ranking and layer."""
    stages, graph = load_catalog().stages, open_folder(folder)
    scores = {}
    with tempfile.TemporaryDirectory() as place:
        dataset = DatasetSource(path=text).model_dump(exclude_unset=True)
        calibrate = stages["calibrate"].model_validate({"dataset": dataset, "samples": samples, "sequence_length": length})
        calibration = run_stage(calibrate, Path(place) / "calibrate", model=graph).calibration
        for ranking in RANKINGS:
            name, chosen = SELECTIONS[ranking]
            stage = stages[name].model_validate({**chosen, "layers": 1})
            result = run_stage(stage, Path(place) / ranking, dtype=dtype, model=graph, calibration=calibration)
            scores[ranking] = dict(result.scores.decisions[0].scores)
    return scores


def draw(scores: dict[str, dict[str, dict[int, float]]], file: Path) -> None:
    """Scores by model, ranking and layer."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(scores), 4), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (model, rankings) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        for ranking, by_layer in rankings.items():
            most = max(by_layer.values())
            axes.plot(list(by_layer), [score / most for score in by_layer.values()], marker=".", label=ranking, alpha=0.85)
        axes.set_title(model)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("score over the largest of its ranking")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw how important layers are.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    scores = {}
    for model in arguments.model:
        name, _, rest = model.partition("=")
        folder, _, text = rest.partition(":")
        scores[name] = score_layers(Path(folder), Path(text), arguments.samples, arguments.length, arguments.dtype)
        for ranking, by_layer in scores[name].items():
            print(name, ranking, " ".join(f"{layer}:{score:.4g}" for layer, score in by_layer.items()), flush=True)
    draw(scores, arguments.file)


if __name__ == "__main__":
    main()
