"""Move each layer's output by the mean of what is missing there, where the layer has a bias that can take it.

The bias of the projection that writes to the layer's output grows by E[h - h'] over its gain: the part of a correction that
needs no Gram matrix. Without a bias it would take a new parameter, which other programs would not load.
Sizes: N tokens that are not padding, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradmap_pipeline import (
    Context,
    CorrectedSite,
    Drift,
    LayerCompensation,
    Site,
    Stage,
    Streams,
    TensorFile,
    hookimpl,
    write_patches,
)


class MeanBias(LayerCompensation):
    """Add the mean of what is missing to the biases of projections, from the first removed layer up."""

    name = "mean_bias"

    wanted = "a bias where it writes to its output, without which a mean would need a new parameter"

    def takes(self, sites: Sequence[Site]) -> bool:
        return _find_bias(sites) is not None

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        graph = streams.graph
        yield from (layer for layer in graph.layers if layer + 1 >= graph.removed[0] and _find_bias(known.get(layer, ())))

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        done, patches = move_bias(streams, layer, known[layer], context)
        return [done], patches


def _find_bias(sites: Sequence[Site]) -> Site | None:
    return next((site for site in sites if site.role != "attention" and site.has_bias and not site.norm), None)


def move_bias(streams: Streams, layer: int, sites: Sequence[Site], context: Context) -> tuple[CorrectedSite, dict[str, TensorFile]]:
    """b ← b + E[h - h'] / gain at one layer, in the pruned stream and in a file."""
    site = _find_bias(sites)
    assert site is not None
    position, drift, missing = streams.graph.layers.index(layer), Drift(), 0.0
    pruned = streams.pruned
    with pruned.look(layer) as step:
        streams.check_gain(layer, site)
        for visit in step:
            drifted, target = visit.output[visit.mask].double(), streams.target(position, visit.batch)[visit.mask].double()
            drift.add(drifted, target)
            missing += float((target - drifted).square().sum())
    streams.join(drift, layer)
    missing = streams.group.sum_values({"missing": missing})["missing"]
    with streams.pruned.model.layer(layer) as module:
        bias = module.get_parameter(f"{site.name}.bias").detach().double()
    patches = write_patches(streams, layer, {f"{site.name}.bias": bias - drift.mean / site.gain}, context)
    restored = drift.tokens * drift.shift**2 / max(missing, 1e-300)
    corrected = CorrectedSite(
        layer=layer,
        parameter=f"{site.name}.bias",
        role="norm" if site.role == "norm" else "output",
        shift=drift.shift,
        relative_shift=drift.relative_shift,
        missing_left=1 - restored,
    )
    return corrected, patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [MeanBias]
