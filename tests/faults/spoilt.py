"""Models to spoil, and what the command line says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app

PRUNE: list[dict[str, Any]] = [{"use": "prune", "with": {"layers": [1]}}, {"use": "export", "with": {"to": "out"}}]
Q1 = "model.layers.1.self_attn.q_proj.weight"


def gradmap(command: str, source: dict[str, Any] | None = None, steps: list[dict[str, Any]] = PRUNE) -> Result:
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": source or {"path": "model"}, "steps": steps}))
    return CliRunner().invoke(app, [command, "r.yaml"])


def assert_refused(message: str, *commands: str, source: dict[str, Any] | None = None) -> None:
    """One line, exit code 2, and nothing written."""
    for command in commands:
        result = gradmap(command, source)
        said = " ".join(result.stderr.split())
        assert message in said, result.output
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not Path("out").exists()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, Any]:
    """Cut the model into two shards; return the index, which is written."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))
