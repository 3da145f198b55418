"""Rankings of layers, by one sweep and by what a corrected model predicts, and which layers a removal may take."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from gradmap_pipeline import (
    CalibrationSet,
    Context,
    CorrectedModel,
    Decision,
    LayerScoring,
    Measure,
    ModelGraph,
    OptionError,
    Round,
    SamplePass,
    Scoring,
    StructureProbe,
    check_regular_removal,
    check_removal_by_config,
    choose_expressible,
    count_removed,
    divide_samples,
    full_config,
    room_for,
    take_lowest,
)
from gradmap_pipeline.testing import make_inputs, run_stage


class UpdateScore(LayerScoring):
    """Rank layers by the norm of what they add to the residual stream."""

    name = "update_score"

    at_once: int = Field(1, ge=1, description="Layers to remove by one ranking.")

    def measure(self, context: Context) -> Measure:
        return Measure(measure_updates, key="norm of updates")

    def describe(self) -> str:
        return "norm of updates"

    def decide(self, kept: Sequence[int], scores: dict[int, float], wanted: int, protected: Collection[int]) -> list[Decision]:
        return take_lowest(kept, scores, min(wanted, self.at_once), protected)


def measure_updates(sweep: SamplePass) -> dict[int, float]:
    return {
        step.layer: sum(float((visit.output - visit.input).norm(dim=-1)[visit.mask].sum()) for visit in step)
        for step in sweep.forward()
    }


class AloneScore(LayerScoring):
    """Rank layers once, by how far the corrected model's predictions move without each of them alone."""

    name = "alone_score"

    def open_scorer(self, model: ModelGraph, calibration: CalibrationSet, context: Context) -> tuple[Any, Scoring]:
        fit, held_out = divide_samples(calibration.load(), max(1, calibration.samples // 4))
        sites, reserve = StructureProbe(model, context.memory).find_sites(), room_for(*model.map_sizes())
        corrected = CorrectedModel(model, fit, held_out, sites, context, reserve=reserve, ridge=0.1, shrink=0.4)
        return "divergence alone", Alone(corrected, model.layers[1:-1])

    def describe(self) -> str:
        return "divergence of the corrected model, alone"


class Alone:
    """Tries every layer once."""

    def __init__(self, corrected: CorrectedModel, layers: Sequence[int]) -> None:
        self.corrected, self.layers = corrected, layers

    def score(self, kept: set[int], before: dict[int, float], /) -> dict[str, Any]:
        scores = {layer: self.corrected.divergence_without(layer) for layer in self.layers if layer in kept}
        work = Round(layer_forwards=self.corrected.layer_forwards, layer_backwards=0, seconds=0)
        return {"scores": scores, "work": work.model_dump()}

    def close(self) -> None:
        self.corrected.close()


inputs = make_inputs(UpdateScore, Path("inputs"))
model = inputs["model"]
scores = run_stage(UpdateScore(ratio=0.25), Path("run"), **inputs).scores
assert len(scores.order) == count_removed(len(model.layers), 0.25) == 3

alone = run_stage(AloneScore(layers=2), Path("alone"), **inputs).scores
assert alone.decisions[0].removed == min(alone.decisions[0].scores, key=alone.decisions[0].scores.__getitem__)

# Where a config places kinds of layers by a cadence, not every removal leaves a model that it can express; here all do.
config = full_config(model.base.folder)
check_removal_by_config(config, model.layers, 3, None, "layers", is_free=True)
removed = choose_expressible(model, scores, 3, regular=False)
assert len(removed) == 3
assert scores.decisions[0].removed in removed
check_regular_removal(config, model.layers, 3, None)
full, window = "full_attention", "sliding_attention"
with pytest.raises(OptionError, match="have no period to keep"):
    check_regular_removal({"num_hidden_layers": 4, "layer_types": [full, full, window, full]}, (0, 1, 2, 3), 1, None)
