"""The texts out of domain that `real.py` measures on: `real_texts.py FOLDER --lambada FILE` writes them to FOLDER.

FILE has one JSON object a line, each with a passage as `text`, as the data of a LAMBADA task of lm-eval has. `python.txt` and
`reference.txt` are of the Python that runs this, so that their figures hold for its version alone.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from inspect import getsource
from pathlib import Path
from pydoc_data.topics import topics

MODULES = ("argparse", "asyncio.base_events", "tarfile", "typing", "inspect")
BETWEEN = "\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the texts out of domain of the benchmark of real models.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lambada", type=Path, required=True)
    arguments = parser.parse_args()
    passages = [json.loads(line)["text"] for line in arguments.lambada.read_text(encoding="utf-8").splitlines()]
    texts = {
        "lambada": passages,
        "python": [getsource(import_module(name)) for name in MODULES],
        "reference": list(topics.values()),
    }
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, parts in texts.items():
        (arguments.folder / f"{name}.txt").write_text(BETWEEN.join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
