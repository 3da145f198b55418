"""Tables and plots of what `real.py` wrote: `python tests/benchmarks/real_tables.py WORK [--docs FOLDER]`.

Prints Markdown: our method against each other one, and every cell with its layers. A cell is a model, a share of layers and a
calibration seed. With `--docs`, writes the cells as `real.csv` and the plots as `real-accuracy.svg` and `real-loss.svg`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from peer_tables import table
from quality import compare_losses, load_reading

Row = dict[str, Any]
OURS = ("look ahead", "gradmap")
"""The selection and the correction that the others are compared with."""


class Results:
    """Rows by what made them."""

    def __init__(self, work: Path, ours: tuple[str, str] = OURS) -> None:
        files = sorted(work.glob("real-*.jsonl"))
        self.rows: list[Row] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        self.ours, self._readings = ours, work / "readings"
        self._by_cell: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = defaultdict(dict)
        for row in self.rows:
            self._by_cell[row["subject"], row["ratio"], row["seed"]][row["selection"], row["correction"]] = row

    def subjects(self) -> list[str]:
        return list(dict.fromkeys(row["subject"] for row in self.rows))

    def dense(self, subject: str) -> Row:
        return self._by_cell[subject, 0.0, 0]["none", "none"]

    def find(self, row: Row, selection: str, correction: str) -> Row:
        """Another row of the cell of this one."""
        return self._by_cell[row["subject"], row["ratio"], row["seed"]][selection, correction]

    def methods(self) -> list[tuple[str, str]]:
        """All but ours and the dense model."""
        found = dict.fromkeys((row["selection"], row["correction"]) for row in self.rows)
        return [method for method in found if method not in (self.ours, ("none", "none"))]

    def pairs(self, method: tuple[str, str]) -> list[tuple[Row, Row]]:
        """Ours and another's, by cell, where both were measured."""
        return [(cell[self.ours], cell[method]) for cell in self._by_cell.values() if self.ours in cell and method in cell]

    def difference(self, one: Row, other: Row, text: str) -> tuple[float, float, float]:
        """Of mean losses, with its 95 % interval."""
        first, second = (load_reading(self._readings / f"{row['reading']} {text}.npz") for row in (one, other))
        return compare_losses(first, second)


def name_of(method: tuple[str, str]) -> str:
    """For people."""
    selection, correction = method
    return selection if correction == "none" else f"{selection} + {correction}"


def describe_opponents(results: Results) -> str:
    """Cells in which our method is better, not worse, or worse, by text and by accuracy. Where tasks were run, of those models."""
    rows, are_finished = [], any("accuracy" in row for row in results.rows)
    texts = list(results.rows[0]["texts"])
    for method in results.methods():
        pairs = [(ours, theirs) for ours, theirs in results.pairs(method) if "accuracy" in theirs or not are_finished]
        if not pairs:
            continue
        for text in texts:
            differences = [results.difference(ours, theirs, text) for ours, theirs in pairs]
            below, above = sum(high < 0 for _, _, high in differences), sum(low > 0 for _, low, _ in differences)
            ratio = math.exp(mean(difference for difference, _, _ in differences))
            rows.append([name_of(method), text, len(pairs), below, len(pairs) - below - above, above, f"{ratio:.3f}"])
        gains = [
            (ours["accuracy"][0] - theirs["accuracy"][0], math.hypot(ours["accuracy"][1], theirs["accuracy"][1]))
            for ours, theirs in pairs
            if "accuracy" in ours and "accuracy" in theirs
        ]
        if gains:
            above, below = sum(gain > error for gain, error in gains), sum(gain < -error for gain, error in gains)
            shown = f"{100 * mean(gain for gain, _ in gains):+.1f} points"
            rows.append([name_of(method), "accuracy", len(gains), above, len(gains) - above - below, below, shown])
    return table(
        [f"{name_of(results.ours)} against", "on", "cells", "better", "alike", "worse", "perplexity ratio, or points"], rows
    )


def tell_closed(results: Results, row: Row) -> str:
    """Of the gap in log-perplexity that the removal opened, what the correction closes, by text; empty where there is none."""
    if row["correction"] == "none":
        return ""
    plain, dense = results.find(row, row["selection"], "none"), results.dense(row["subject"])
    shares = []
    for name, text in row["texts"].items():
        whole, pruned, corrected = (math.log(one["perplexity"]) for one in (dense["texts"][name], plain["texts"][name], text))
        shares.append(f"{100 * (pruned - corrected) / (pruned - whole):.0f}")
    return " / ".join(shares)


def describe_cells(results: Results, subject: str, *, is_timed: bool) -> str:
    """Every cell of a model."""
    dense = results.dense(subject)
    texts = list(dense["texts"])
    rows = []
    for row in sorted((row for row in results.rows if row["subject"] == subject), key=lambda row: (row["ratio"], row["seed"])):
        method = name_of((row["selection"], row["correction"])) if row["selection"] != "none" else "dense"
        perplexities = " / ".join(f"{row['texts'][text]['perplexity']:.1f}" for text in texts)
        first = row["texts"][texts[0]]
        accuracy = f"{100 * row['accuracy'][0]:.1f} ± {100 * row['accuracy'][1]:.1f}" if "accuracy" in row else ""
        probe = f"{row['agreeing tokens']:.1f}, {row['ends in a loop']:.0%}" if "accuracy" in row else ""
        agreement = f"{first['divergence']:.2f}, {first['agreement']:.0%}"
        work = row["select evaluations"] + row["correct evaluations"]
        seconds = row["select seconds"] + row["correct seconds"]
        cell = [f"{row['ratio']:.0%}", row["seed"], method, row["removed"].replace(" ", ", ")]
        figures = [perplexities, tell_closed(results, row), agreement, accuracy, probe]
        size = f"{row['bytes'] / 2**20:.0f}" if "bytes" in row else ""
        rows.append([*cell, *figures, size, f"{work:.0f}", *([f"{seconds:.0f}"] if is_timed else [])])
    headings = [
        "removed",
        "seed",
        "method",
        "layers",
        f"perplexity: {' / '.join(texts)}",
        "gap closed, %",
        "KL, top-1",
        "accuracy, %",
    ]
    return table([*headings, "tokens agreeing, loops", "MiB", "evaluations", *(["seconds"] if is_timed else [])], rows)


def describe_tasks(results: Results, subject: str) -> str:
    """Accuracy by task, of every cell of a model that has it."""
    rows = [row for row in results.rows if row["subject"] == subject and "tasks" in row]
    names = list(rows[0]["tasks"]) if rows else []
    lines = []
    for row in sorted(rows, key=lambda row: (row["ratio"], row["seed"])):
        method = name_of((row["selection"], row["correction"])) if row["selection"] != "none" else "dense"
        each = [f"{100 * row['tasks'][name][0]:.1f}" for name in names]
        lines.append([f"{row['ratio']:.0%}", method, *each, f"{100 * row['accuracy'][0]:.1f} ± {100 * row['accuracy'][1]:.1f}"])
    return table(["removed", "method", *(name.removeprefix("local_") for name in names), "mean"], lines)


def draw(results: Results, file: Path, ordinate: str, abscissa: str) -> None:
    """One plot a model: accuracy against bytes, or loss against seconds or evaluations. Only what a method ends with is shown.

    A point says which share of the layers is gone; a bar is a standard error.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    is_size, is_accuracy = abscissa == "MiB", ordinate == "accuracy"

    def place(row: Row) -> tuple[float, float]:
        across = row["bytes"] / 2**20 if is_size else row[f"select {abscissa}"] + row[f"correct {abscissa}"]
        return across, 100 * row["accuracy"][0] if is_accuracy else math.log(next(iter(row["texts"].values()))["perplexity"])

    subjects = results.subjects()
    figure = Figure(figsize=(6 * len(subjects), 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        for number, method in enumerate([results.ours, *results.methods()]):
            rows = [row for row in results.rows if row["subject"] == subject and (row["selection"], row["correction"]) == method]
            rows = sorted((row for row in rows if "accuracy" in row), key=place)
            if not rows:
                continue
            points, errors = [place(row) for row in rows], [100 * row["accuracy"][1] if is_accuracy else 0 for row in rows]
            style = {"linestyle": "-" if is_size else "", "marker": "o" if method[1] == "gradmap" else "x", "alpha": 0.85}
            axes.errorbar(*zip(*points, strict=True), yerr=errors, color=f"C{number % 10}", label=name_of(method), **style)
            for row, point in zip(rows, points, strict=True):
                axes.annotate(f"{row['ratio']:.0%}", point, xytext=(4, 4), textcoords="offset points", fontsize=7)
        dense = results.dense(subject)
        axes.axhline(place(dense)[1], color="grey", linestyle=":", label="dense")
        axes.set_title(subject)
        axes.set_xlabel("MiB of weights" if is_size else f"{abscissa} to choose and correct")
        axes.set_ylabel("mean zero-shot accuracy, %" if is_accuracy else "loss in domain, nats a token")
        if not is_size:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the benchmark of real models.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--docs", type=Path, help="folder to write real.csv and the plots to")
    parser.add_argument("--without-times", action="store_true", help="leave out seconds, of a machine that was shared")
    parser.add_argument("--ours", default=" + ".join(OURS), help="the method that the others are compared with")
    arguments = parser.parse_args()
    selection, _, correction = arguments.ours.partition(" + ")
    results = Results(arguments.work, (selection, correction or "none"))
    print(describe_opponents(results))
    for subject in results.subjects():
        print(f"### {subject}\n\n{describe_cells(results, subject, is_timed=not arguments.without_times)}")
        print(describe_tasks(results, subject))
    if arguments.docs:
        with (arguments.docs / "real.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in results.rows for name in row)))
            writer.writeheader()
            writer.writerows(results.rows)
        draw(results, arguments.docs / "real-accuracy.svg", "accuracy", "MiB")
        draw(results, arguments.docs / "real-loss.svg", "loss", "evaluations" if arguments.without_times else "seconds")


if __name__ == "__main__":
    main()
