"""GradMAP against its peers: every selection with corrections, on trained models, with equal calibration tokens.

    python tests/benchmarks/peers.py WORK --model builtin --other TEXT
    python tests/benchmarks/peers.py WORK --model NAME=FOLDER:CALIBRATION:HELDOUT --other TEXT

`--model` is `builtin`, or a folder with the texts to calibrate on and to measure on in domain (`NAME=FOLDER` alone: those of the
built-in model; `NAME=FOLDER:self`: the model's own samples). `--other` is a text out of domain. One line a cell goes to
WORK/peers-NAME.csv, what each model says of each sequence to WORK/readings; a run that was stopped goes on. `peer_tables.py` makes
tables and a plot of it. One thread; layer forwards and backwards are counted by the sweeps themselves.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from quality import LENGTH, Text

from gradmap_pipeline import CalibrationSet, DatasetSource, ModelGraph, OptionError, Stage, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER
from gradmap_pipeline.recipe.catalog import load_catalog
from gradmap_pipeline.testing import run_stage

RATIOS = (0.1, 0.25, 0.33)
SAMPLES = 128
UNGUARDED = {"protect_first": 0, "protect_last": 0}
SELECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradmap": ("gradmap_score", {}),
    "gradmap, all samples": ("gradmap_score", {"sample_share": 1.0}),
    "gradmap, one shot": ("gradmap_score", {"schedule": "one_shot"}),
    "gradmap, update": ("gradmap_score", {"metric": "update_gradient"}),
    "gradmap, weights": ("gradmap_score", {"metric": "weight_gradient", "sample_share": 1.0}),
    "look ahead": ("lookahead_score", {}),
    "sleb": ("sleb_score", {}),
    "perplexity": ("perplexity_score", {}),
    "shortgpt": ("shortgpt_score", {}),
    "angular, last token": ("angular_score", {}),
    "angular, all tokens": ("angular_score", {"tokens": "all"}),
    "taylor+": ("taylor_score", {}),
    "taylor": ("taylor_score", UNGUARDED),
    "magnitude": ("magnitude_score", {}),
    "last layers": ("last_layers_score", {}),
    "random 0": ("random_score", {"draw": 0}),
    "random 1": ("random_score", {"draw": 1}),
    "random 2": ("random_score", {"draw": 2}),
    "mka": ("mka_merge", {}),
}
CORRECTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradmap": ("project_compensate", {}),
    "gradmap, nothing held back": ("project_compensate", {"shrink": 0.0, "ridge": 0.3}),
    "gradmap, down-projection only": ("project_compensate", {"attention": False}),
    "gradmap, largest shift": ("project_compensate", {"attention": False, "site": "largest_shift", "shrink": 0.0}),
    "replaceme": ("replaceme_compensate", {}),
    "linearpatch, folded": ("linearpatch_compensate", {"tolerance": 1.0}),
    "prune&comp": ("prunecomp_compensate", {}),
}
CORRECTED = ("gradmap", "look ahead", "sleb", "shortgpt", "angular, last token")
"""Selections that are corrected."""
MAIN = (*CORRECTED, "taylor+")
"""Selections that are made with every seed; the others with the first."""


def corrections_of(selection: str, brief: bool) -> tuple[str, ...]:
    """GradMAP's own variants on its own selection, and the peers' on four."""
    if selection not in CORRECTED:
        return ()
    if brief:
        return "gradmap", "replaceme"
    return tuple(CORRECTIONS) if selection == "gradmap" else ("gradmap", "replaceme", "linearpatch, folded")


@dataclass(frozen=True)
class Design:
    """What is made of each model, from how much text."""

    methods: dict[str, tuple[str, ...]]
    """By selection: the corrections of what it chooses, besides none."""
    ratios: tuple[float, ...] = RATIOS
    samples: int = SAMPLES
    length: int = LENGTH
    dtype: str = "float32"
    """Type that selections and corrections compute in."""


@dataclass(frozen=True)
class Subject:
    """A model and its texts."""

    name: str
    graph: ModelGraph
    calibration: DatasetSource
    texts: dict[str, DatasetSource]


@dataclass(frozen=True)
class Cell:
    """One model that a method makes."""

    subject: str
    seed: int
    ratio: float
    selection: str
    correction: str
    graph: ModelGraph
    removed: str
    select_evaluations: float
    select_seconds: float
    correct_evaluations: float = 0.0
    correct_seconds: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        return self.subject, str(self.seed), str(self.ratio), self.selection, self.correction


def make_subject(text: str, other: Path, work: Path) -> Subject:
    """From a `--model` option."""
    name, _, rest = text.partition("=")
    folder, *texts = rest.split(":")
    graph = open_folder(BUILTIN_FOLDER if not rest else Path(folder))
    sources = [DatasetSource(builtin="calibration"), DatasetSource(builtin="heldout")]
    if texts == ["self"]:
        sources = [DatasetSource(path=file) for file in write_samples(graph, work / name)]
    elif texts:
        sources = [DatasetSource(path=Path(file)) for file in texts]
    return Subject(name, graph, sources[0], {"in domain": sources[1], "out of domain": DatasetSource(path=other)})


def write_samples(graph: ModelGraph, folder: Path) -> list[Path]:
    """Texts that the model writes itself, at temperature 1: one file to calibrate on, one to measure on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = [folder / "calibration.txt", folder / "heldout.txt"]
    if all(file.is_file() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(graph.base.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(graph.base.folder)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 2 * LENGTH, "pad_token_id": 0}
    start = torch.full((64, 1), int(model.config.bos_token_id))
    for file in files:
        texts = [
            text for _ in range(6) for text in tokenizer.batch_decode(model.generate(start, **options), skip_special_tokens=True)
        ]
        file.write_text("\n\n".join(texts), encoding="utf-8")
    return files


class Bench:
    """All cells of one subject and one calibration seed."""

    def __init__(self, subject: Subject, seed: int, work: Path, design: Design, known: Sequence[dict[str, str]] = ()) -> None:
        """`known`: rows of an earlier run, whose selections are not made again."""
        self.subject, self.seed, self.work, self.design = subject, seed, work, design
        self.stages = load_catalog().stages
        options = {
            "dataset": subject.calibration.model_dump(exclude_unset=True),
            "samples": design.samples,
            "sequence_length": design.length,
        }
        stage = self.stages["calibrate"].model_validate(options)
        folder = work / "steps" / subject.name / str(seed)
        self.folder = folder
        self.calibration: CalibrationSet = run_stage(stage, folder / "calibrate", seed=seed, model=subject.graph).calibration
        plain = [row for row in known if row["correction"] == "none" and row["seed"] == str(seed)]
        self._known = {(row["selection"], row["ratio"]): row for row in plain}
        self._chosen: dict[tuple[str, int], Any] = {}
        self._corrected: dict[tuple[str, str], Cell] = {}

    def cells(self) -> Iterator[Cell]:
        depth = len(self.subject.graph.layers)
        ratios = self.design.ratios
        numbers = {max(1, round(ratio * depth)) for ratio in ratios}
        counts = {count: min(ratios, key=lambda ratio: abs(ratio - count / depth)) for count in numbers}
        for selection, corrections in self.design.methods.items():
            for count, ratio in sorted(counts.items()):
                try:
                    plain = self._select(selection, count, ratio)
                except (OptionError, StageError):
                    continue  # too few layers that are not protected, or too few samples for this method
                yield plain
                for correction in corrections:
                    if done := self._correct(plain, correction):
                        yield done

    def _run(self, name: str, options: dict[str, Any], place: str, **inputs: Any) -> tuple[Any, float]:
        stage: Stage = self.stages[name].model_validate(options)
        started = time.perf_counter()
        given = {name: value for name, value in inputs.items() if name in type(stage).Inputs.model_fields}
        result = run_stage(stage, self.folder / place, seed=self.seed, dtype=self.design.dtype, **given)
        return result, time.perf_counter() - started

    def _select(self, selection: str, count: int, ratio: float) -> Cell:
        known = self._known.get((selection, str(ratio)))
        if known is not None and selection != "mka":  # which does more than remove
            graph = self.subject.graph.without_layers({int(layer) for layer in known["removed"].split()})
            took = float(known["select evaluations"]), float(known["select seconds"])
            return Cell(self.subject.name, self.seed, ratio, selection, "none", graph, known["removed"], *took)
        result = self._choose(selection, count)
        graph = getattr(result, "model", None) or self.subject.graph.without_layers(result.scores.order[:count])
        rounds = result.work.rounds if hasattr(result, "work") else ()
        rounds = rounds[:count]  # of a method that ranks again after each removal, those that this many take
        evaluations = sum(part.layer_forwards + part.layer_backwards for part in rounds)
        removed = " ".join(map(str, graph.removed))
        seconds = sum(part.seconds for part in rounds)
        return Cell(self.subject.name, self.seed, ratio, selection, "none", graph, removed, evaluations, seconds)

    def _choose(self, selection: str, count: int) -> Any:
        """Decisions are made once for the largest count, where those for fewer are the first of them."""
        name, options = SELECTIONS[selection]
        most = max(1, round(max(self.design.ratios) * len(self.subject.graph.layers)))
        together = name in ("angular_score", "mka_merge")
        key = selection, count if together else most
        if key not in self._chosen:
            inputs = {"model": self.subject.graph, "calibration": self.calibration}
            self._chosen[key], _ = self._run(name, {**options, "layers": key[1]}, f"{selection} {key[1]}", **inputs)
        return self._chosen[key]

    def _correct(self, plain: Cell, correction: str) -> Cell | None:
        """The same correction of the same layers is computed once for all selections."""
        key = plain.removed, correction
        if key not in self._corrected:
            name, options = CORRECTIONS[correction]
            inputs = {"model": plain.graph, "calibration": self.calibration}
            try:
                result, seconds = self._run(name, options, f"{correction} {plain.removed}", **inputs)
            except StageError:  # the method has no layer before the cut, or no regular problem there
                return None
            evaluations = result.work.layer_evaluations
            self._corrected[key] = replace(plain, graph=result.model, correct_evaluations=evaluations, correct_seconds=seconds)
        corrected = self._corrected[key]
        return replace(
            plain,
            correction=correction,
            graph=corrected.graph,
            correct_evaluations=corrected.correct_evaluations,
            correct_seconds=corrected.correct_seconds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare GradMAP with its peers.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--brief", action="store_true", help="with the first seed too, only what is made with every seed")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    work = arguments.work.resolve()
    subject = make_subject(arguments.model, arguments.other, work)
    texts = {name: Text(subject.graph, source, arguments.sequences) for name, source in subject.texts.items()}
    readings = work / "readings"
    readings.mkdir(parents=True, exist_ok=True)
    seen: dict[str, dict[str, Any]] = {}
    file = work / f"peers-{subject.name}.csv"
    known = list(csv.DictReader(file.open())) if file.is_file() else []
    done = {tuple(row.values())[:5] for row in known}
    with file.open("a", newline="") as table:
        writer = csv.writer(table)
        if not done:
            texts_of = [f"{name}, {what}" for name in texts for what in ("perplexity", "divergence", "agreement")]
            names = ["subject", "seed", "ratio", "selection", "correction", "removed", "select evaluations", "select seconds"]
            writer.writerow([*names, "correct evaluations", "correct seconds", "reading", *texts_of])
        dense = {name: text.read(subject.graph) for name, text in texts.items()}
        for name, reading in dense.items():
            reading.save(readings / f"{subject.name} dense {name}.npz")
        if (subject.name, "0", "0", "none", "none") not in done:
            values = [value for reading in dense.values() for value in reading.summary().values()]
            writer.writerow([subject.name, 0, 0, "none", "none", "", 0, 0, 0, 0, f"{subject.name} dense", *values])
        for seed in range(arguments.seeds):
            brief = arguments.brief or seed > 0
            methods = {name: corrections_of(name, brief) for name in (MAIN if brief else SELECTIONS)}
            for cell in Bench(subject, seed, work, Design(methods), known).cells():
                if cell.key in done:
                    continue
                label = f"{subject.name} {cell.graph.digest[:16]}"
                if label not in seen:
                    seen[label] = {name: text.read(cell.graph) for name, text in texts.items()}
                    for name, reading in seen[label].items():
                        reading.save(readings / f"{label} {name}.npz")
                values = [value for reading in seen[label].values() for value in reading.summary().values()]
                works = [cell.select_evaluations, cell.select_seconds, cell.correct_evaluations, cell.correct_seconds]
                writer.writerow([*cell.key, cell.removed, *works, label, *values])
                table.flush()


if __name__ == "__main__":
    main()
