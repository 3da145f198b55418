"""Corrections work on models whose layers share keys and values: they need hidden states, and no gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from gradmap_plugins.export import ExportModel
from gradmap_plugins.project_compensate import ProjectCompensate
from tiny import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import make_config

from gradmap_pipeline import Forecasts
from gradmap_pipeline.checkpoint.graph import ModelGraph, open_folder
from gradmap_pipeline.stages.structure_probe import StructureProbe
from gradmap_pipeline.testing import run_stage


def last_hidden(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What enters the final norm, (B, T, D), as plain transformers computes it."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    entering: list[torch.Tensor] = []
    norm = next(module for name, module in model.named_modules() if name.endswith("norm") and name.count(".") == 1)
    norm.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return entering[-1]


@pytest.mark.parametrize("removed", [[1], [0, 1]])
def test_correction_lowers_what_is_missing_as_transformers_computes_it(removed: list[int], tmp_path: Path, text: Path) -> None:
    torch.manual_seed(0)
    config: Any = make_config("gemma4_unified_text")
    assert config.num_kv_shared_layers
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    graph = open_folder(tmp_path / "base")
    pruned = graph.without_layers(removed)
    StructureProbe(graph, 2**30).check_layerwise()
    draw = Calibrate.model_validate({"dataset": {"path": text}, "samples": 16, "sequence_length": 32})
    calibration = run_stage(draw, tmp_path / "calibrate", model=graph).calibration
    stage = ProjectCompensate(ridge=0.01, shrink=0)
    ProjectCompensate.inspect(stage, Forecasts(ProjectCompensate), StructureProbe(graph, 2**30))
    corrected = run_stage(stage, tmp_path / "correct", model=pruned, calibration=calibration).model
    ids, _ = calibration.load()

    def export(model: ModelGraph, name: str) -> Path:
        run_stage(ExportModel(to=tmp_path / name), tmp_path / f"{name}-step", model=model)
        return tmp_path / name

    wanted = last_hidden(tmp_path / "base", ids)
    missing = [float((last_hidden(export(model, name), ids) - wanted).square().sum()) for model, name in
               ((pruned, "pruned"), (corrected, "corrected"))]  # fmt: skip
    assert AutoConfig.from_pretrained(tmp_path / "corrected").num_kv_shared_layers == 2
    assert missing[1] < 0.9 * missing[0]
