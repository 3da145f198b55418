"""Which experts to remove: loss on held-out text after each criterion of `prune_experts`, over calibration seeds.

    python tests/benchmarks/experts.py WORK FOLDER [--ratio 0.25] [--seeds 3] [--other TEXT]

FOLDER: a mixture of experts that `tests/tools/train.py --experts N` has trained. Prints a Markdown table: the loss of the whole
model in nats a token, and what each criterion adds to it, by seed, with the 95 % interval of its difference to `reap`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from peer_tables import table
from quality import LENGTH, Reading, Text, compare_losses

from gradmap_pipeline import DatasetSource, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.testing import run_stage

CRITERIA = ("reap", "frequency", "random")
SAMPLES = 64


def prune(graph: ModelGraph, criterion: str, ratio: float, seed: int, work: Path) -> ModelGraph:
    """The model without a share of its experts, chosen on samples that the seed draws."""
    stages = load_catalog().stages
    text = {"dataset": {"builtin": "calibration"}, "samples": SAMPLES, "sequence_length": LENGTH}
    folder = work / f"{criterion}-{seed}"
    calibration = run_stage(stages["calibrate"].model_validate(text), folder / "text", seed=seed, model=graph).calibration
    stage = stages["prune_experts"].model_validate({"ratio": ratio, "criterion": criterion})
    pruned: ModelGraph = run_stage(stage, folder / "model", seed=seed, model=graph, calibration=calibration).model
    return pruned


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to rank experts.")
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=192)
    parser.add_argument("--other", type=Path, help="a text out of domain")
    given = parser.parse_args()
    graph = open_folder(given.folder)
    sources = {"in domain": DatasetSource(builtin="heldout")}
    if given.other:
        sources["out of domain"] = DatasetSource(path=given.other)
    texts = {name: Text(graph, source, given.sequences) for name, source in sources.items()}
    whole = {name: text.read(graph) for name, text in texts.items()}
    rows = []
    for seed in range(given.seeds):
        readings: dict[str, dict[str, Reading]] = {}
        for criterion in CRITERIA:
            pruned = prune(graph, criterion, given.ratio, seed, given.work)
            readings[criterion] = {name: text.read(pruned) for name, text in texts.items()}
        for name in texts:
            for criterion in CRITERIA:
                added, _, _ = compare_losses(readings[criterion][name], whole[name])
                more, low, high = compare_losses(readings[criterion][name], readings["reap"][name])
                interval = "" if criterion == "reap" else f"{more:+.4f} ({low:+.4f} to {high:+.4f})"
                rows.append([seed, name, criterion, f"{added:+.4f}", interval])
    print(*(f"{name}: perplexity of the whole model {reading.perplexity:.2f}" for name, reading in whole.items()), sep="\n")
    print(table(["seed", "text", "criterion", "nats added", "more than `reap`"], rows))


if __name__ == "__main__":
    main()
