"""Pruning: which layers go, and what the plan refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.prune import Prune
from pydantic import ValidationError
from walk import make_model as make_any_model

from gradmap_pipeline import Decision, Forecasts, LayerScores, ModelForecast, OptionError, ScoresForecast, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.stages.removal import count_removed
from gradmap_pipeline.testing import run_stage


def decide(layer: int, scores: dict[int, float]) -> Decision:
    return Decision(removed=layer, scores=scores, removed_if_unprotected=layer)


def make_scores(model: str, order: list[int]) -> LayerScores:
    return LayerScores(
        model=model,
        method="by hand",
        decisions=tuple(Decision(removed=n, scores={n: 0.0}, removed_if_unprotected=n) for n in order),
    )


@pytest.mark.parametrize(("options", "kept"), [({}, (0, 1, 3)), ({"layers": 2}, (1, 3)), ({"ratio": 0.6}, (1, 3))])
def test_takes_the_first_decisions(llama: Path, tmp_path: Path, options: dict[str, Any], kept: tuple[int, ...]) -> None:
    model = open_folder(llama)
    result = run_stage(Prune.model_validate(options), tmp_path, model=model, scores=make_scores(model.digest, [2, 0]))
    assert result.model.layers == kept
    assert result.model.label == "pruned"


def test_a_list_needs_no_scores(llama: Path, tmp_path: Path) -> None:
    assert run_stage(Prune(layers=[3, 0]), tmp_path, model=open_folder(llama)).model.layers == (1, 2)


def test_scores_of_another_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the scores were made on another model"):
        run_stage(Prune(layers=1), tmp_path, model=open_folder(llama), scores=make_scores("0" * 64, [1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2, "layers": 2}, "give one of 'ratio', 'layers' and 'target'; found 'ratio' and 'layers'"),
        ({"layers": 0}, "'layers' must be at least 1, found 0"),
        ({"layers": [1, 1]}, "must list different layers"),
        ({"layers": []}, "must list different layers"),
        ({"layers": [-1]}, "must list different layers, counted from 0"),
        ({"ratio": 1.0}, "less than 1"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Prune.model_validate(options)


PRUNED = ModelForecast(layers=5, kept=(0, 1, 2, 4, 5))
FIXED = ModelForecast(layers=12, kept=tuple(range(12)), config={"num_hidden_layers": 12, "scale_attn_by_inverse_layer_idx": True})
CADENCE = {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 2}
ALTERNATING = ModelForecast(layers=12, kept=tuple(range(12)), config=CADENCE)

WINDOWS = ModelForecast(
    layers=9,
    kept=tuple(range(9)),
    config={"model_type": "gemma3_text", "num_hidden_layers": 9, "layer_types": ["sliding", "sliding", "full_attention"] * 3},
)
KINDS = {"num_hidden_layers": 12, "layer_types": ["conv"] * 4 + ["full_attention"] + ["conv"] * 7}
IRREGULAR = ModelForecast(layers=12, kept=tuple(range(12)), config=KINDS)


@pytest.mark.parametrize(
    ("options", "inputs", "option", "message"),
    [
        ({"ratio": 0.33}, {"scores": ScoresForecast(decisions=3)}, "ratio", "removes 4 of 12 layers, but only 3 removals are"),
        ({"layers": 5}, {"scores": ScoresForecast(decisions=3)}, "layers", "removes 5 of 12 layers, but only 3 removals are"),
        ({"layers": [12]}, {}, "layers", "there is no layer 12: the model has layers 0 to 11"),
        ({"layers": [3, 5]}, {"model": PRUNED}, "layers", "there is no layer 3: the model has layers 0, 1, 2, 4, 5"),
        ({"layers": [1]}, {"model": FIXED}, "layers", "'scale_attn_by_inverse_layer_idx' ties each layer to its index"),
        (
            {"layers": [3]},
            {"model": ALTERNATING},
            "layers",
            r"by a cadence \(attn_layer_period = 4, attn_layer_offset = 2\), which .*; possible, for instance: remove 1$",
        ),
        (
            {"ratio": 0.25},
            {"model": ALTERNATING, "scores": ScoresForecast(decisions=3)},
            "ratio",
            "'attn_layer_period', 'attn_layer_offset' place layers by a cadence, .* set `among: expressible` to .* remove ",
        ),
        (
            {"layers": [1], "among": "regular"},
            {"model": WINDOWS},
            "layers",
            "layers that would be left do not keep the period of their kinds; possible, for instance: remove 8$",
        ),
        (
            {"ratio": 0.2, "among": "regular"},
            {"model": IRREGULAR, "scores": ScoresForecast(decisions=3)},
            "among",
            "the kinds of the model's 12 layers have no period to keep; use `any` or `expressible`",
        ),
        (
            {"layers": 2, "among": "regular"},
            {"scores": ScoresForecast(decisions=2, all_or_nothing=True)},
            "among",
            "were chosen to go together, and 'regular' would choose among them",
        ),
        ({"layers": 2}, {}, "layers", "nothing says which layers to remove; put gradmap_score before this step"),
        ({"layers": 12}, {"scores": None}, "layers", "removing 12 of 12 layers leaves none"),
    ],
)
def test_the_plan_refuses(options: dict[str, Any], inputs: dict[str, Any], option: str, message: str) -> None:
    known = {"model": ModelForecast(layers=12, kept=tuple(range(12))), **inputs}
    with pytest.raises(OptionError, match=message) as caught:
        Prune.model_validate(options).forecast(Forecasts(Prune, **known))
    assert caught.value.option == option


def test_the_plan_knows_how_many_layers_are_left() -> None:
    whole = ModelForecast(layers=12, kept=tuple(range(12)), positions=512)
    inputs = Forecasts(Prune, model=whole, scores=ScoresForecast(decisions=3))
    assert Prune(layers=[3, 5]).forecast(Forecasts(Prune, model=whole)) == {
        "model": ModelForecast(layers=10, kept=(0, 1, 2, 4, 6, 7, 8, 9, 10, 11), positions=512)
    }
    assert Prune().forecast(inputs) == {"model": ModelForecast(layers=9, positions=512)}
    assert Prune().forecast(Forecasts(Prune, model=None, scores=None)) == {"model": ModelForecast()}


@pytest.mark.parametrize(("depth", "ratio", "count"), [(12, 0.1, 1), (12, 0.25, 3), (12, 0.33, 4), (32, 0.25, 8), (4, 0.05, 1)])
def test_share_of_layers(depth: int, ratio: float, count: int) -> None:
    assert count_removed(depth, ratio) == count


def test_advice_where_programs_place_layers_by_index() -> None:
    inputs = Forecasts(Prune, model=WINDOWS, scores=ScoresForecast(decisions=3))
    assert Prune(layers=3).advise(inputs) == (
        "llama.cpp and mlx-lm place layers of gemma3_text by their index, which most removals break; `among: regular` chooses "
        "among those that do not",
    )
    assert Prune(layers=3, among="regular").advise(inputs) == ()
    assert Prune(layers=[3]).advise(inputs) == ()
    assert Prune(layers=3).advise(Forecasts(Prune, model=IRREGULAR)) == ()


def test_a_regular_removal_is_chosen_by_total_score(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = open_folder(make_any_model(tmp_path / "model", "gemma3_text", layer_types=kinds))
    scores = LayerScores(
        model=model.digest,
        method="by hand",
        decisions=tuple(decide(n, {0: 5.0, 1: 0.1, 2: 3.0, 3: 4.0, 4: 1.0, 5: 2.0}) for n in (1, 4)),
    )
    result = run_stage(Prune(layers=2, among="regular"), tmp_path / "a", model=model, scores=scores).model
    assert result.removed == (4, 5)  # the fourth layer left may be 3 or 4, and no other removal goes
    guarded = scores.model_copy(update={"protected": (5,)})
    with pytest.raises(StageError, match="keeps the period of their kinds takes one of layers 5, which are protected"):
        run_stage(Prune(layers=2, among="regular"), tmp_path / "b", model=model, scores=guarded)
