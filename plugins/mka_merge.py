"""MKA: neighbouring layers that say the same are merged into one.

Source: https://arxiv.org/abs/2406.16330. What leaves a layer, one vector a sample, is laid out in two dimensions by a diffusion
map; two layers are alike by S = I₁₂ / √(H₁H₂), mutual information over entropies there. The most alike neighbours are merged,
θ ← Sθ₁ + (1 - S)θ₂, until enough are gone. The published program merges nothing, and is last_layers_score.
Sizes: n samples, D hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Artifact,
    CalibrationSet,
    Context,
    Estimate,
    Forecasts,
    ModelCosts,
    ModelGraph,
    OptionError,
    Outlook,
    Round,
    Stage,
    StageError,
    StructureProbe,
    TensorFile,
    Work,
    check_same_layers,
    check_tokenizer,
    count_removed,
    hookimpl,
    known,
    load_tensor,
    open_sweep,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

_WIDTH, _DENSITY, _DIMENSIONS = 8.0, 0.5, 2
_NEIGHBOURS = 5
Tree = int | tuple["Tree", "Tree", float]
"""A layer as it is, or two trees and the share of the first."""


def diffusion_map(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Coordinates (n, 2) of points (n, D): the leading eigenvectors, after the constant one, of a Markov chain between them.

    Kernel exp(-√(distance / 8)), density taken out with exponent 1/2. Source: https://doi.org/10.1016/j.acha.2006.04.006
    """
    import numpy as np
    from scipy.spatial.distance import cdist

    kernel = np.exp(-np.sqrt(cdist(points, points) / _WIDTH))
    density = kernel.sum(1)
    kernel = kernel / np.outer(density, density) ** _DENSITY
    degree = kernel.sum(1)
    values, vectors = np.linalg.eigh(kernel / np.sqrt(np.outer(degree, degree)))
    order = np.argsort(values)[::-1][1 : _DIMENSIONS + 1]
    coordinates: np.ndarray[Any, Any] = vectors[:, order] / np.sqrt(degree)[:, None] * values[order]
    coordinates /= np.maximum(coordinates.std(0), 1e-12)
    return coordinates


def information(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Mutual information in nats between coordinates (n, 2), by five nearest neighbours; the mean over pairs of coordinates."""
    from sklearn.feature_selection import mutual_info_regression

    estimates = [mutual_info_regression(one, column, n_neighbors=_NEIGHBOURS, random_state=0).mean() for column in other.T]
    return float(sum(estimates) / len(estimates))


def likeness(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """I₁₂ / √(I₁₁I₂₂) between coordinates (n, 2) of two layers, between 0 and 1.

    An entropy is a variable's information about itself. Estimated so it is of the same kind as I₁₂, and cannot be negative, as the
    differential entropy of clustered points is.
    """
    whole = information(one, one) * information(other, other)
    return min(1.0, information(one, other) / math.sqrt(whole)) if whole > 0 else 0.0


class Merge(BaseModel):
    """One layer merged into the one below it."""

    into: int
    """Base layer that is left."""
    merged: int
    """Base layer that is gone."""
    share: float
    """Number of the layer that is left."""


class Merges(Artifact):
    """Layers merged, in order."""

    merges: tuple[Merge, ...]


class MkaMerge(Stage):
    """Merge neighbouring layers whose outputs are most alike (MKA)."""

    name = "mka_merge"
    requires = ("sklearn",)
    extra = "mka"
    libraries = ("torch", "transformers", "numpy", "scikit-learn", "scipy")

    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the layers to merge away. Default: 0.25.")
    layers: int | None = Field(None, ge=1, description="How many layers to merge away, instead of `ratio`.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        merges: Merges
        work: Work

    @model_validator(mode="after")
    def _check_count(self) -> MkaMerge:
        if self.ratio is not None and self.layers is not None:
            raise ValueError("give 'ratio' or 'layers', not both")
        return self

    def forecast(self, inputs: Forecasts) -> Outlook:
        model, samples = inputs.of(ModelGraph), inputs.of(CalibrationSet).samples
        if samples is not None and samples <= _NEIGHBOURS:
            option = "layers" if self.layers is not None else "ratio"
            raise OptionError(option, f"layers are compared by {_NEIGHBOURS} neighbours of each sample; calibrate on more samples")
        layers = None if model.layers is None else model.layers - self._count(model.layers)
        return {"model": model.model_copy(update={"layers": layers, "kept": None})}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        probe.check_removable()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        text = inputs.of(CalibrationSet)
        depth = known(inputs.of(ModelGraph).layers)
        sweep = costs.forward_sweep(depth, known(text.samples), known(text.sequence_length), losses=False)
        count, size = self._count(depth), costs.stored_layer_bytes // len(costs.graph.layers)
        largest = max(tensor.elements for layer in costs.graph.layers for tensor in costs.graph.layer_tensors(layer).values())
        held = 8 * (1 + int(math.log2(count + 1))) + 4  # at most: values in fp64, and one as it is read
        read = 2 * count * size
        merging = Estimate(costs.program_bytes + held * largest, read, seconds=read * costs.speed.read_again())
        return sweep + merging + costs.given(count * size)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        check_tokenizer(inputs.calibration, inputs.model)
        graph = inputs.model
        count = self._count(len(graph.layers))
        places, work = self._place_layers(graph, inputs.calibration, context)
        shares = {(low, high): likeness(places[low], places[high]) for low, high in pairwise(graph.layers)}
        kept, merges = list(graph.layers), []
        with context.progress("merge layers", count, "layer") as advance:
            for _ in range(count):
                pairs = list(pairwise(kept))
                for pair in pairs:
                    if pair not in shares:
                        shares[pair] = likeness(places[pair[0]], places[pair[1]])
                low, high = max(pairs, key=shares.__getitem__)
                merges.append(Merge(into=low, merged=high, share=shares[low, high]))
                kept.remove(high)
                places[low] = places[high]  # what leaves the merged layer stands for what left the upper one
                shares = {pair: share for pair, share in shares.items() if low not in pair and high not in pair}
                advance()
        check_same_layers(graph.base, tuple(kept))
        patches = merge_weights(graph, merges, context)
        for merge in merges:
            context.note(f"layer {merge.merged} merged into {merge.into}, which keeps a share of {merge.share:.3f}")
        merged = graph.with_patches(patches, "merged").without_layers({merge.merged for merge in merges}, "merged")
        return self.Outputs(model=merged, merges=Merges(merges=tuple(merges)), work=Work(rounds=(work,)))

    def _count(self, depth: int) -> int:
        count = self.layers if self.layers is not None else count_removed(depth, 0.25 if self.ratio is None else self.ratio)
        if count >= depth:
            raise OptionError(
                "layers" if self.layers is not None else "ratio", f"merging away {count} of {depth} layers leaves none"
            )
        return count

    def _place_layers(
        self, graph: ModelGraph, calibration: CalibrationSet, context: Context
    ) -> tuple[dict[int, np.ndarray[Any, Any]], Round]:
        """Coordinates of every sample by layer, from the mean over tokens of what leaves the layer."""
        import sklearn.feature_selection  # noqa: F401 - its libraries are in memory before the sweep is planned
        import torch

        started = time.perf_counter()
        vectors_by_layer: dict[int, list[torch.Tensor]] = {layer: [] for layer in graph.layers}
        with open_sweep(graph, calibration.load(), context) as sweep:
            for step in sweep.forward():
                for visit in step:
                    real = visit.mask[..., None]
                    vectors_by_layer[step.layer].append(((visit.output.double() * real).sum(1) / real.sum(1)).cpu())
        work = Round(layer_forwards=sweep.layer_forwards, layer_backwards=0, seconds=time.perf_counter() - started)
        return {layer: diffusion_map(torch.cat(vectors).numpy()) for layer, vectors in vectors_by_layer.items()}, work


def merge_weights(graph: ModelGraph, merges: list[Merge], context: Context) -> dict[str, TensorFile]:
    """θ_low ← Sθ_low + (1 - S)θ_high, one merge after another, for all tensors of a layer, written as the checkpoint is.

    One tensor of a layer at a time is merged, in fp64, from the leaves of its tree of merges up.
    """
    import torch

    names = {layer: _name_tensors(graph, layer) for merge in merges for layer in (merge.into, merge.merged)}
    for merge in merges:
        one, other = (
            {tail: graph.stored_tensor(name).shape for tail, name in names[layer].items()} for layer in (merge.into, merge.merged)
        )
        if one != other:
            raise StageError(f"layers {merge.into} and {merge.merged} are not of one kind and cannot be merged; merge fewer layers")
    trees: dict[int, Tree] = {layer: layer for layer in names}
    for merge in merges:
        trees[merge.into] = (trees[merge.into], trees.pop(merge.merged), merge.share)
    patches: dict[str, TensorFile] = {}
    for layer, tree in trees.items():
        for tail, name in names[layer].items():
            value = _merge(tree, graph, {leaf: names[leaf][tail] for leaf in names if tail in names[leaf]})
            dtype: torch.dtype = getattr(torch, graph.dtype or graph.stored_tensor(name).torch_dtype)
            patches[name] = TensorFile.save({name: value.to(dtype).contiguous()}, context.folder / f"{name}.safetensors")
            del value
    return patches


def _merge(tree: Tree, graph: ModelGraph, names: Mapping[int, str]) -> torch.Tensor:
    """The value of a tree, in fp64. `names`: of the tensor in each layer.

    What takes more values at a time is made first, so that they are as few as can be.
    """
    if isinstance(tree, int):
        return load_tensor(graph.stored_tensor(names[tree])).double()
    low, high, share = tree
    if _count_values(low) >= _count_values(high):
        one = _merge(low, graph, names)
        other = _merge(high, graph, names)
    else:
        other = _merge(high, graph, names)
        one = _merge(low, graph, names)
    return one.mul_(share).add_(other.mul_(1 - share))


def _count_values(tree: Tree) -> int:
    """How many values of a tree are there at a time, as in Ershov's numbers."""
    if isinstance(tree, int):
        return 1
    low, high = _count_values(tree[0]), _count_values(tree[1])
    return max(low, high) if low != high else low + 1


def _name_tensors(graph: ModelGraph, layer: int) -> dict[str, str]:
    """The names of a layer's floating-point tensors, by what they are called inside it."""
    start = len(f"{graph.base.layer_prefix}.{layer}.")
    return {name[start:]: name for name, tensor in graph.layer_tensors(layer).items() if tensor.is_float}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MkaMerge]
