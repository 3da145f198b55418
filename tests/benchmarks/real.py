"""Real pretrained models: selections and corrections at several depths, by perplexity, divergence, tasks and continuations.

    python tests/benchmarks/real.py WORK --model NAME=FOLDER:CALIBRATION:HELDOUT --other NAME=TEXT --tasks FOLDER

`--model` is a folder with the texts to calibrate on and to measure on in domain; `--other` a text out of domain, any number of
them; `--tasks` a folder of lm-eval tasks. One line of JSON a cell goes to WORK/real-NAME.jsonl, what each model says of sequences
to WORK/readings; a run that was stopped goes on. `real_tables.py` makes tables and plots of it. Equal layers with equal corrections
are measured once. Models that are not corrected, but could be, are measured on the texts alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from answers import PROMPT, continue_greedily, count_agreeing, ends_in_loop, mean_accuracy, measure_accuracy
from peers import CORRECTIONS, SELECTIONS, Bench, Cell, Design, Subject
from quality import Text

from gradmap_pipeline import DatasetSource, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.export.transformers_folder import write_transformers_folder
from gradmap_pipeline.testing import make_context

RATIOS = (0.1, 0.2, 0.27, 0.33)
METHODS: dict[str, tuple[str, ...]] = {
    "look ahead": ("gradmap",),
    "gradmap": ("gradmap",),
    "sleb": ("gradmap",),
    "shortgpt": ("gradmap", "prune&comp"),
    "taylor+": (),
    "angular, last token": ("replaceme",),
}
"""By selection: the corrections of what it chooses, besides none."""


class Examiner:
    """Measures models against the dense one."""

    def __init__(self, subject: Subject, work: Path, arguments: argparse.Namespace) -> None:
        self.subject, self.work, self.arguments = subject, work, arguments
        self.readings = work / "readings"
        self.readings.mkdir(parents=True, exist_ok=True)
        length, sequences = arguments.length, arguments.sequences
        self.texts = {
            name: Text(subject.graph, source, sequences, length, arguments.dtype) for name, source in subject.texts.items()
        }
        ids = next(iter(self.texts.values())).ids
        self.prompts = ids[: arguments.prompts, :PROMPT]
        self._dense = continue_greedily(subject.graph.base.folder, self.prompts, arguments.dtype)
        self._seen: dict[str, dict[str, Any]] = {}

    def measure(self, graph: ModelGraph, *, asked: bool) -> dict[str, Any]:
        """All measures of a model, as JSON; what its folder answers where it is `asked`."""
        known = self._seen.setdefault(graph.digest, {})
        if not known:
            known |= self._read_texts(graph)
        if asked and "accuracy" not in known:
            known |= self._ask(graph)
        return known

    def _read_texts(self, graph: ModelGraph) -> dict[str, Any]:
        label = f"{self.subject.name} {graph.digest[:16]}"
        texts = {}
        for name, text in self.texts.items():
            reading = text.read(graph)
            reading.save(self.readings / f"{label} {name}.npz")
            texts[name] = reading.summary()
        return {"reading": label, "texts": texts}

    def _ask(self, graph: ModelGraph) -> dict[str, Any]:
        """What the folder answers that the model is exported to."""
        folder = self.work / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = write_transformers_folder(graph, folder, make_context(self.work / "scratch"), 5 << 30)
        weights = [file.size for name, file in files.items() if name.endswith(".safetensors")]
        continuations = continue_greedily(folder, self.prompts, self.arguments.dtype)
        agreeing = [count_agreeing(ours, dense) for ours, dense in zip(continuations, self._dense, strict=True)]
        looping = [ends_in_loop(tokens) for tokens in continuations]
        answers: dict[str, Any] = {
            "bytes": sum(weights),
            "parameters": graph.count_parameters(),
            "agreeing tokens": sum(agreeing) / len(agreeing),
            "ends in a loop": sum(looping) / len(looping),
        }
        if self.arguments.tasks:
            tasks = measure_accuracy(folder, self.arguments.tasks, self.arguments.questions, self.arguments.dtype)
            answers |= {"tasks": tasks, "accuracy": mean_accuracy(tasks)}
        return answers


def make_subject(model: str, others: list[str]) -> Subject:
    """From `--model` and `--other`."""
    name, _, rest = model.partition("=")
    folder, calibration, heldout = rest.split(":")
    texts = {"in domain": DatasetSource(path=Path(heldout))}
    texts |= {title: DatasetSource(path=Path(file)) for title, _, file in (other.partition("=") for other in others)}
    return Subject(name, open_folder(Path(folder)), DatasetSource(path=Path(calibration)), texts)


def run_cells(subject: Subject, design: Design, seeds: int, work: Path, known: list[dict[str, Any]]) -> Iterator[Cell]:
    """The dense model first, then every cell of every seed."""
    yield Cell(subject.name, 0, 0.0, "none", "none", subject.graph, "", 0.0, 0.0)
    for seed in range(seeds):
        rows = [{key: str(value) for key, value in row.items()} for row in known]
        yield from Bench(subject, seed, work, design, rows).cells()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods on a real model.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--other", action="append", default=[])
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--questions", type=int, help="of each task; default: all")
    parser.add_argument(
        "--method", action="append", help=f"a selection, or `SELECTION + CORRECTION`; default: {', '.join(METHODS)}"
    )
    parser.add_argument("--ratio", type=float, action="append", help="share of the layers to remove")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence, for calibration and for texts")
    parser.add_argument("--sequences", type=int, default=64, help="of each text")
    parser.add_argument("--prompts", type=int, default=32, help="that are continued")
    parser.add_argument("--dtype", default="float32", help="type that models are measured in")
    parser.add_argument("--method-dtype", default="float32", help="type that selections and corrections compute in")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    subject = make_subject(arguments.model, arguments.other)
    ratios = tuple(arguments.ratio or RATIOS)
    design = Design(choose_methods(arguments.method), ratios, arguments.samples, arguments.length, arguments.method_dtype)
    examiner = Examiner(subject, work, arguments)
    file = work / f"real-{subject.name}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {tuple(map(str, (row["subject"], row["seed"], row["ratio"], row["selection"], row["correction"]))) for row in known}
    with file.open("a") as table:
        for cell in run_cells(subject, design, arguments.seeds, work, known):
            if cell.key not in done:
                asked = cell.correction != "none" or not design.methods.get(cell.selection)
                row = {name: value for name, value in vars(cell).items() if name != "graph"}
                row |= examiner.measure(cell.graph, asked=asked)
                table.write(json.dumps({name.replace("_", " "): value for name, value in row.items()}) + "\n")
                table.flush()


def choose_methods(chosen: list[str] | None) -> dict[str, tuple[str, ...]]:
    """From `--method`. Raises `SystemExit` where one is not known."""
    if chosen is None:
        return METHODS
    methods: dict[str, tuple[str, ...]] = {}
    for method in chosen:
        selection, _, correction = method.partition(" + ")
        if selection not in SELECTIONS or (correction and correction not in CORRECTIONS):
            raise SystemExit(f"--method {method!r}: a selection of {list(SELECTIONS)}, ' + ', a correction of {list(CORRECTIONS)}")
        methods[selection] = (*methods.get(selection, ()), *((correction,) if correction else ()))
    return methods


if __name__ == "__main__":
    main()
