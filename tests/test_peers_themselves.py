"""Rankings against the peers' own functions, where those can be run as they are.

Reads checkouts from the folder in the environment variable GRADMAP_PEERS: `ShortGPT` (github.com/sramshetty/ShortGPT) and
`ReplaceMe` (github.com/mts-ai/ReplaceMe). Without it, these tests are skipped.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.angular_score import AngularScore
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.shortgpt_score import ShortgptScore
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.testing import run_stage

pytestmark = pytest.mark.slow
LAYERS = 6


def load_functions(file: str, *names: str) -> dict[str, Any]:
    """Functions of a file in a checkout, without what the file imports besides torch."""
    place = os.environ.get("GRADMAP_PEERS")
    if place is None:
        pytest.skip("GRADMAP_PEERS names no folder of checkouts")
    tree = ast.parse((Path(place) / file).read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(wanted) == len(names)
    namespace: dict[str, Any] = {"torch": torch, "List": list}
    exec(compile(ast.Module(wanted, []), file, "exec"), namespace)
    return namespace


@pytest.fixture
def setting(text: Path, tmp_path: Path) -> tuple[Any, Any, list[torch.Tensor]]:
    """A model, calibration samples, and what enters layer 0, 1 ... and leaves the last."""
    model = open_folder(make_model(tmp_path / "model", num_hidden_layers=LAYERS))
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 8, "sequence_length": 32})
    calibration = run_stage(stage, tmp_path / "calibration", model=model).calibration
    whole = AutoModelForCausalLM.from_pretrained(model.base.folder).eval()
    seen: list[torch.Tensor] = []
    for module in [*whole.model.layers, whole.model.norm]:
        module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        whole(input_ids=calibration.load()[0])
    return model, calibration, seen


def test_shortgpt(setting: tuple[Any, Any, list[torch.Tensor]], tmp_path: Path) -> None:
    model, calibration, seen = setting
    theirs = load_functions("ShortGPT/short_gpt/metrics.py", "block_influence")["block_influence"]
    expected = {layer: float(theirs(seen[layer], seen[layer + 1]).sum()) for layer in range(LAYERS)}
    scores = run_stage(ShortgptScore(layers=4), tmp_path, model=model, calibration=calibration).scores
    assert scores.decisions[0].scores == pytest.approx(expected, rel=1e-4)
    assert scores.order == tuple(sorted(expected, key=expected.__getitem__)[:4])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_window_of_replaceme(size: int, setting: tuple[Any, Any, list[torch.Tensor]], tmp_path: Path) -> None:
    model, calibration, seen = setting
    names = ("angular_distance", "get_last_non_padded_tokens", "compute_block_distances")
    theirs = load_functions("ReplaceMe/ReplaceMe/utils.py", *names)
    last = theirs["get_last_non_padded_tokens"](seen, torch.ones(8, 32))
    distances = theirs["compute_block_distances"](last, size)
    scores = run_stage(AngularScore(layers=size), tmp_path, model=model, calibration=calibration).scores
    ours = scores.decisions[0].scores
    assert [ours[start] / 8 for start in range(LAYERS - size + 1)] == pytest.approx(distances, rel=1e-3)
    best = min(range(len(distances)), key=distances.__getitem__)
    assert scores.order == tuple(range(best, best + size))
