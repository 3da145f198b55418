"""Write docs/consumers.md: what programs make of exports, from runs in docs/consumers.json and from what the package knows.

    python tests/consumers_table.py docs

A row of docs/consumers.json has `program`, `version`, `architecture`, `model`, `removed` (layers), `format`, `result` and `figure`;
`read: true` marks one that comes from a program's source, not from a run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gradmap_pipeline.export.consumers import PLACINGS, Placing

HEADER = """# What programs make of exports

Made by `make consumers` from `docs/consumers.json`, which `tests/consumers_run.py` fills, and from
`gradmap_pipeline/export/consumers.py`.

## Runs

A program runs the export beside the model, which this package computes in float32. `agrees` means that the log-probability of the
likeliest token differs by less than 0.1 nats at every position looked at, and both find the same token likeliest at nine of ten, or
that greedy decoding gives the same tokens. Prompts are random, which is hard on quantised files: logits lie close together there.
`runs quantised`: the weights are quantised, and the figure is held to no limit.

| program | version | architecture | model | layers removed | format | result | figure |
|---|---|---|---|---|---|---|---|
"""

READ = """
## Layers placed by index

These programs derive the role of a layer from its index, and ignore `layer_types` and other lists of a config. An export
whose layers are elsewhere is another model there. `gradmap check` and the notes of `export` name the layers; `prune` with
`among: regular` chooses layers that leave the pattern as it is, and `export` with `programs: [mlx-lm]` refuses a folder that
mlx-lm would misread. `read` rows come from the program's source and were not run.

| program | version | architecture | layers of this kind | taken for it | how a file or config tells it | source | seen |
|---|---|---|---|---|---|---|---|
"""


def describe_run(row: dict[str, Any]) -> str:
    """A row of the first table."""
    removed = ", ".join(map(str, row["removed"])) or "none"
    cells = [row["program"], row["version"], row["architecture"], row["model"], removed, row["format"]]
    cells += [f"read: {row['result']}" if row.get("read") else row["result"], row["figure"]]
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def describe_placing(placing: Placing) -> str:
    """A row of the second table."""
    told = [f"GGUF array `{placing.array}`"] if placing.array else []
    told += [f"config field `{placing.field}`"] if placing.field else []
    taken = "all" if placing.period == 1 else f"the {'first' if placing.is_first else 'last'} of every {placing.period}"
    cells = [placing.program, placing.version, placing.types[0], placing.role, taken, ", ".join(told) or "not at all"]
    return f"| {' | '.join([*cells, f'`{placing.source}`', 'run' if placing.was_run else 'read'])} |"


def make_page(rows: list[dict[str, Any]]) -> str:
    """The whole page."""
    order = sorted(rows, key=lambda row: (row["program"].lower(), row["architecture"], row["model"], row["removed"], row["format"]))
    return HEADER + "\n".join(map(describe_run, order)) + "\n" + READ + "\n".join(map(describe_placing, PLACINGS)) + "\n"


def main(docs: Path) -> None:
    """Write the page into a folder that has the data file."""
    rows = json.loads((docs / "consumers.json").read_text(encoding="utf-8"))
    (docs / "consumers.md").write_text(make_page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
