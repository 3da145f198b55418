"""A ranking of layers by one sweep, and which layers a removal may take."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from pydantic import Field

from gradmap_pipeline import (
    Context,
    Decision,
    LayerScoring,
    Measure,
    OptionError,
    SamplePass,
    check_regular_removal,
    check_removal_by_config,
    choose_expressible,
    count_removed,
    full_config,
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


inputs = make_inputs(UpdateScore, Path("inputs"))
model = inputs["model"]
scores = run_stage(UpdateScore(ratio=0.25), Path("run"), **inputs).scores
assert len(scores.order) == count_removed(len(model.layers), 0.25) == 3

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
