"""Tables and a plot of what `peers.py` wrote: `python tests/benchmarks/peer_tables.py WORK [--docs FOLDER]`.

Prints Markdown: GradMAP against each peer with paired bootstrap intervals, all selections, all corrections, and whether the claims
about quality hold, cell by cell. A cell is a model, a share of layers and a calibration seed. With `--docs`, writes `peers.csv` and
`peers.svg` there.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from quality import compare_losses, load_reading

Row = dict[str, str]
DOMAINS = ("in domain", "out of domain")
OPPONENTS = {
    "SLEB": ("sleb", "none"),
    "ShortGPT": ("shortgpt", "none"),
    "Taylor+": ("taylor+", "none"),
    "ReplaceMe": ("angular, last token", "replaceme"),
    "SLEB's selection, ReplaceMe's correction": ("sleb", "replaceme"),
    "SLEB's selection, GradMAP's correction": ("sleb", "gradmap"),
}
LAYERS = {"builtin": 12, "docs": 12, "stories": 5, "deep": 24}


def load_rows(work: Path) -> list[Row]:
    return [row for file in sorted(work.glob("peers-*.csv")) for row in csv.DictReader(file.open())]


class Results:
    """Rows by what made them."""

    def __init__(self, work: Path) -> None:
        self.rows = load_rows(work)
        self._readings = work / "readings"
        self._by_key = {(row["subject"], row["ratio"], row["seed"], row["selection"], row["correction"]): row for row in self.rows}
        self.subjects = list(dict.fromkeys(row["subject"] for row in self.rows))

    def cells(self, subject: str | None = None) -> list[tuple[str, str, str]]:
        """Model, share, seed, where GradMAP has been measured."""
        return [key[:3] for key in self._by_key if key[3:] == ("gradmap", "gradmap") and (subject is None or key[0] == subject)]

    def row(self, cell: tuple[str, str, str], selection: str, correction: str) -> Row | None:
        return self._by_key.get((*cell, selection, correction))

    def dense(self, subject: str) -> Row:
        return self._by_key[subject, "0", "0", "none", "none"]

    def difference(self, one: Row, other: Row, domain: str) -> tuple[float, float, float]:
        """Of mean losses, with its 95 % interval."""
        first, second = (load_reading(self._readings / f"{row['reading']} {domain}.npz") for row in (one, other))
        return compare_losses(first, second)


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def evaluations(row: Row) -> float:
    return float(row["select evaluations"]) + float(row["correct evaluations"])


def sleb_as_published(layers: int, removed: int) -> int:
    """Layer forwards of the published search, without a kept prefix: each candidate runs all layers that are left."""
    return sum((layers - 2 - done) * (layers - 1 - done) for done in range(removed))


def describe_opponents(results: Results) -> str:
    """Cells in which GradMAP, scored and corrected by default, is better, not worse, or worse."""
    rows = []
    for name, (selection, correction) in OPPONENTS.items():
        for domain in DOMAINS:
            counts: defaultdict[str, int] = defaultdict(int)
            differences: list[float] = []
            for cell in results.cells():
                ours, theirs = results.row(cell, "gradmap", "gradmap"), results.row(cell, selection, correction)
                if ours is None or theirs is None:
                    continue
                difference, low, high = results.difference(ours, theirs, domain)
                differences.append(difference)
                counts["below" if high < 0 else "above" if low > 0 else "equal"] += 1
            if differences:
                verdicts = [counts[verdict] for verdict in ("below", "equal", "above")]
                rows.append([name, domain, len(differences), *verdicts, f"{math.exp(mean(differences)):.3f}"])
    headings = ["GradMAP against", "text", "cells", "interval below 0", "around 0", "above 0", "perplexity ratio, geometric mean"]
    return table(headings, rows)


def describe_selections(results: Results, subject: str) -> str:
    """Mean over seeds of perplexity in and out of domain, and what choosing took, by share of layers."""
    cells = results.cells(subject)
    ratios = sorted({cell[1] for cell in cells}, key=float)
    rows = []
    wanted = dict.fromkeys((row["selection"], row["correction"]) for row in results.rows if row["selection"] != "none")
    for selection, correction in wanted:
        line: list[str] = [selection, correction]
        for ratio in ratios:
            measured = [row for cell in cells if cell[1] == ratio and (row := results.row(cell, selection, correction))]
            if not measured:
                line += ["", "", ""]
                continue
            line += [f"{mean(float(row[f'{domain}, perplexity']) for row in measured):.2f}" for domain in DOMAINS]
            line.append(f"{mean(map(evaluations, measured)):.0f}")
        if any(line[2:]):
            rows.append(line)
    headings = ["selection", "correction"]
    for ratio in ratios:
        headings += [f"{float(ratio):.0%} in", "out", "evaluations"]
    return table(headings, rows)


def describe_compensation(results: Results) -> str:
    """Share of the gap in log-perplexity that the default correction of the default selection closes."""
    rows = []
    for subject in results.subjects:
        dense = results.dense(subject)
        for ratio in sorted({cell[1] for cell in results.cells(subject)}, key=float):
            closed, moved, agreement, divergence = [], [], [], []
            for cell in results.cells(subject):
                plain, done = results.row(cell, "gradmap", "none"), results.row(cell, "gradmap", "gradmap")
                if cell[1] != ratio or plain is None or done is None:
                    continue
                before, after, whole = (math.log(float(row["in domain, perplexity"])) for row in (plain, done, dense))
                closed.append((before - after) / (before - whole))
                moved.append(results.difference(done, plain, "out of domain"))
                agreement.append((float(plain["in domain, agreement"]), float(done["in domain, agreement"])))
                divergence.append((float(plain["in domain, divergence"]), float(done["in domain, divergence"])))
            worst = max(moved)
            pairs = [
                f"{mean(pair[0] for pair in pairs):.3f} → {mean(pair[1] for pair in pairs):.3f}"
                for pairs in (divergence, agreement)
            ]
            outside = f"{worst[0]:+.4f} ({worst[1]:+.4f} to {worst[2]:+.4f})"
            rows.append([subject, f"{float(ratio):.0%}", len(closed), f"{mean(closed):.1%}", *pairs, outside])
    headings = [
        "model",
        "removed",
        "seeds",
        "gap closed in domain",
        "KL, nats",
        "top-1 agreement",
        "out of domain, worst seed: loss change",
    ]
    return table(headings, rows)


def describe_work(results: Results) -> str:
    """Layer evaluations of GradMAP, scored and corrected, against SLEB as published."""
    rows = []
    for subject in results.subjects:
        for ratio in sorted({cell[1] for cell in results.cells(subject)}, key=float):
            measured = [
                row for cell in results.cells(subject) if cell[1] == ratio and (row := results.row(cell, "gradmap", "gradmap"))
            ]
            removed = len(measured[0]["removed"].split())
            published = sleb_as_published(LAYERS[subject], removed)
            ours = max(map(evaluations, measured))
            kept = [
                float(row["select evaluations"])
                for cell in results.cells(subject)
                if cell[1] == ratio and (row := results.row(cell, "sleb", "none"))
            ]
            shown = f"{mean(kept):.0f}" if kept else ""
            rows.append([subject, f"{removed} of {LAYERS[subject]}", f"{ours:.1f}", published, f"1/{published / ours:.1f}", shown])
    return table(["model", "removed", "GradMAP, most of all seeds", "SLEB as published", "ratio", "SLEB, prefix kept"], rows)


def draw(results: Results, file: Path) -> None:
    """Perplexity over the dense model's against layer evaluations, a quarter of the layers removed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = {
        ("gradmap", "gradmap"): ("GradMAP", "C0", "o"),
        ("gradmap", "none"): ("GradMAP, not corrected", "C0", "x"),
        ("sleb", "none"): ("SLEB, prefix kept", "C1", "x"),
        ("sleb", "gradmap"): ("SLEB + GradMAP's correction", "C1", "o"),
        ("shortgpt", "none"): ("ShortGPT", "C2", "x"),
        ("taylor+", "none"): ("Taylor+", "C3", "x"),
        ("angular, last token", "replaceme"): ("ReplaceMe", "C4", "s"),
    }
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2, 2).flatten()
    for plot, subject in zip(axes, results.subjects, strict=False):
        cells = [cell for cell in results.cells(subject) if cell[1] == "0.25"]
        dense = float(results.dense(subject)["in domain, perplexity"])
        for (selection, correction), (label, colour, marker) in shown.items():
            measured = [row for cell in cells if (row := results.row(cell, selection, correction))]
            if measured:
                ratios = [float(row["in domain, perplexity"]) / dense for row in measured]
                plot.plot(list(map(evaluations, measured)), ratios, marker, color=colour, label=label, alpha=0.8)
        plot.set_xscale("log")
        plot.xaxis.set_major_formatter("{x:.0f}")
        plot.xaxis.set_minor_formatter("{x:.0f}")
        plot.tick_params(axis="x", which="minor", labelsize=6)
        plot.set_title(f"{subject}, a quarter of {LAYERS[subject]} layers removed", fontsize=10)
        plot.set_xlabel("layer evaluations (passes of all samples through one layer)")
        plot.set_ylabel("perplexity / dense, in domain")
        plot.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the benchmark of peers.")
    parser.add_argument("work", type=Path)
    parser.add_argument("--docs", type=Path, help="folder to write peers.csv and peers.svg to")
    arguments = parser.parse_args()
    results = Results(arguments.work)
    print(describe_opponents(results), describe_work(results), describe_compensation(results), sep="\n")
    for subject in results.subjects:
        dense = results.dense(subject)
        figures = ", ".join(f"{float(dense[f'{domain}, perplexity']):.2f} {domain}" for domain in DOMAINS)
        print(f"### {subject}: dense {figures}\n\n{describe_selections(results, subject)}")
    if arguments.docs:
        with (arguments.docs / "peers.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, results.rows[0])
            writer.writeheader()
            writer.writerows(results.rows)
        draw(results, arguments.docs / "peers.svg")


if __name__ == "__main__":
    main()
