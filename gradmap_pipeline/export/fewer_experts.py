"""A checkpoint of a mixture of experts that has some of its experts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StageError
from .folders import check_loading

if TYPE_CHECKING:
    from ..artifacts import TensorFile
    from ..checkpoint.checkpoint import StoredTensor
    from ..checkpoint.experts import ExpertLayout
    from ..checkpoint.graph import ModelGraph
    from ..context import Context


def write_fewer_experts(
    model: ModelGraph, layout: ExpertLayout, kept: Mapping[int, Sequence[int]], folder: Path, context: Context
) -> tuple[ModelGraph, list[TensorFile]]:
    """Write the model with some experts, as many in each layer, into a new folder: a base of its own, and its files of weights.

    `kept`: experts by base layer, ascending. A layer's tensors of all experts are in memory at a time. Raises `StageError` unless
    transformers finds a place for every tensor, and a tensor for every place.
    """
    from ..artifacts import TensorFile
    from ..checkpoint.architecture import prune_config
    from ..checkpoint.checkpoint import write_folder
    from ..checkpoint.companions import copy_companions
    from ..checkpoint.experts import count_in_config, select_experts
    from ..checkpoint.graph import open_folder
    from ..checkpoint.infinities import to_json

    if not kept:
        raise StageError("no layer has experts to keep")
    cuts = folder / "cuts"
    cuts.mkdir(parents=True)
    with context.progress("cut experts out", len(layout.layers) + 1, "layer") as advance:
        tensors: dict[str, StoredTensor] = {}
        for part in select_experts(model, layout, kept, cuts):
            tensors |= part
            advance()
    place = folder / "model"
    place.mkdir()
    files = []
    with context.progress("write weights", len(tensors), "tensor") as advance:
        for name, written in write_folder(tensors, place, model.dtype):
            files.append(TensorFile(path=place / name, sha256=written.sha256))
        advance(len(tensors))
    for file in cuts.iterdir():
        file.unlink()
    cuts.rmdir()
    copy_companions(model.base.folder, place)
    config = prune_config(model.base.folder, model.layers)
    count_in_config(config, layout, len(next(iter(kept.values()))))
    (place / "config.json").write_text(to_json(config, model.base.folder), encoding="utf-8")
    check_loading(place)
    graph = open_folder(place, model.base.name)
    return graph.model_copy(update={"label": "experts pruned", "dtype": model.dtype}), files
