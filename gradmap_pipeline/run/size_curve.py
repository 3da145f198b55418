"""What a model is worth at several depths, all from one ranking: the recipe that measures it, and the curve."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.graph import ModelGraph
from ..measurements import Evaluation

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from .runner import RunState


@dataclass(frozen=True)
class CurvePoint:
    """The model at one depth."""

    layers: int
    removed: tuple[int, ...]
    """Base layers."""
    parameters: int
    bytes: int
    speedup: float
    """Estimated: seconds of a pass of the whole model over its own, from one layer and the head tried with made-up weights."""
    perplexity: float
    perplexity_ratio: float
    """To the whole model."""


def name_model(given: str) -> dict[str, Any]:
    """`model` of a recipe for a folder, `owner/name` of a hub, or `builtin:NAME`."""
    if given.startswith("builtin:"):
        return {"builtin": given.partition(":")[2]}
    if not Path(given).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not given.startswith("."):
        return {"id": given}
    return {"path": given}


def choose_counts(most: int, points: int) -> list[int]:
    """Numbers of layers to remove, from 1 to `most`, spread evenly: at most `points` of them."""
    points = min(points, most)
    return sorted({1 + round((most - 1) * index / max(points - 1, 1)) for index in range(points)})


def write_curve_recipe(
    model: dict[str, Any], ranking: str, counts: Sequence[int], text: dict[str, Any], held_out: dict[str, Any], **amount: int
) -> str:
    """A recipe, as JSON, that ranks once and measures the whole model and each depth.

    `text`, `held_out`: data sets of calibration and of the measurement. `amount`: `samples` and `sequence_length` of both.
    """
    measure = {"dataset": held_out, **amount}
    steps: list[dict[str, Any]] = [
        {"use": "evaluate", "id": "evaluate_0", "from": {"model": "model.model"}, "with": measure},
        {"use": "calibrate", "with": {"dataset": text, **amount}},
        {"use": ranking, "with": {"layers": max(counts)}},
    ]
    for count in counts:
        steps += [
            {"use": "prune", "id": f"prune_{count}", "from": {"model": "model.model"}, "with": {"layers": count}},
            {"use": "evaluate", "id": f"evaluate_{count}", "from": {"model": f"prune_{count}.model"}, "with": measure},
        ]
    return json.dumps({"version": 1, "model": model, "steps": steps})


def read_curve(state: RunState, counts: Sequence[int], machine: Machine) -> list[CurvePoint]:
    """The whole model and each depth that a run of such a recipe has measured."""
    from ..cost.layer_benchmark import LayerBenchmark

    whole: Any = state.outputs["model"]["model"]
    pruned: dict[int, Any] = {count: state.outputs[f"prune_{count}"]["model"] for count in counts}
    models: dict[int, ModelGraph] = {0: whole, **pruned}
    evaluations: dict[int, Any] = {count: state.outputs[f"evaluate_{count}"]["evaluation"] for count in models}
    measured: dict[int, Evaluation] = evaluations
    tokens = measured[0].sequence_length
    benchmark = LayerBenchmark(whole, machine.prepare_torch(), machine.dtype)
    layer, head = benchmark.layer_pass(1, tokens).forward, benchmark.head_pass(1, tokens).forward
    seconds = {count: head + layer * len(model.layers) for count, model in models.items()}
    return [
        CurvePoint(
            layers=len(model.layers),
            removed=model.removed,
            parameters=model.count_parameters(),
            bytes=model.size_bytes,
            speedup=seconds[0] / seconds[count],
            perplexity=measured[count].perplexity,
            perplexity_ratio=measured[count].perplexity / measured[0].perplexity,
        )
        for count, model in models.items()
    ]
