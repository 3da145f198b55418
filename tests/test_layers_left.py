"""A plan counts the layers that a correction reaches as the correction chooses them, where the recipe says which are removed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradmap_plugins.linearpatch_compensate import LinearpatchCompensate
from gradmap_plugins.project_compensate import ProjectCompensate
from gradmap_plugins.refit_layers import RefitLayers
from gradmap_plugins.replaceme_compensate import ReplacemeCompensate
from tiny import make_model

from gradmap_pipeline import LayerCompensation, LayersLeft, ModelCosts, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import StageError
from gradmap_pipeline.machine.machine import Machine

LAYERS = 6


def chosen_by(stage: LayerCompensation) -> Callable[[ModelGraph], int]:
    def count(graph: ModelGraph) -> int:
        streams: Any = SimpleNamespace(graph=graph)
        try:
            return len(list(stage.choose(streams, {})))
        except StageError:  # there is no layer below a cut
            return 0

    return count


@pytest.mark.parametrize(
    ("planned", "chosen"),
    [
        (LayersLeft.count_drifting, chosen_by(ProjectCompensate())),
        (LayersLeft.count_before_cuts, chosen_by(ProjectCompensate(site="before_cuts"))),
        (LayersLeft.count_before_cuts, chosen_by(ReplacemeCompensate())),
        (LayersLeft.count_before_cuts, chosen_by(LinearpatchCompensate())),
        (LayersLeft.count_drifting, lambda graph: len(RefitLayers(layers="all_after_first_cut").choose(graph))),
        (LayersLeft.count_next_to_cuts, lambda graph: len(RefitLayers(layers="next_to_cuts").choose(graph))),
    ],
)
def test_as_many_as_are_chosen(planned: Callable[[LayersLeft], int], chosen: Callable[[ModelGraph], int], tmp_path: Path) -> None:
    """For each set of one to five of six layers; where it is not known which they are, no fewer."""
    model = open_folder(make_model(tmp_path / "model", num_hidden_layers=LAYERS))
    for number in range(1, LAYERS):
        most = planned(LayersLeft(model.layers, LAYERS - number))
        counts = []
        for removed in itertools.combinations(range(LAYERS), number):
            graph = model.without_layers(removed)
            counts.append(chosen(graph))
            assert planned(LayersLeft(model.layers, len(graph.layers), graph.layers)) == counts[-1], removed
        assert max(counts) == most


@pytest.mark.parametrize(
    "stage", [ProjectCompensate(), ProjectCompensate(site="before_cuts"), ReplacemeCompensate(), LinearpatchCompensate()]
)
def test_fewer_layers_to_correct_take_less(stage: LayerCompensation, tmp_path: Path) -> None:
    costs = ModelCosts(make_model(tmp_path / "model", num_hidden_layers=LAYERS), "model", None, Machine(), tmp_path)

    def flops(kept: tuple[int, ...] | None) -> float:
        return stage.estimate_streams(LayersLeft(costs.graph.layers, 3, kept), 8, 32, costs).flops

    assert flops((0, 1, 2)) < flops((1, 3, 5)) <= flops((0, 2, 4)) == flops(None)


def test_the_first_look_for_the_largest_shift_is_the_pass_through_the_model(tmp_path: Path) -> None:
    costs = ModelCosts(make_model(tmp_path / "model", num_hidden_layers=LAYERS), "model", None, Machine(), tmp_path)
    left = LayersLeft(costs.graph.layers, LAYERS - 1, costs.graph.layers[:-1])  # one layer drifts
    one, two = (ProjectCompensate(site="largest_shift", sites=sites).estimate_streams(left, 8, 32, costs) for sites in (1, 2))
    assert one.flops == ProjectCompensate().estimate_streams(left, 8, 32, costs).flops < two.flops
