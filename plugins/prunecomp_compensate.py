"""Prune&Comp: bring the hidden states back to the magnitude that they had, by one factor for each cut, inside weights.

Source: https://arxiv.org/abs/2507.18212. With x what enters the cut and y what left the removed layers, a is the mean over samples
and channels c of mean_t |y_c| / mean_t |x_c|. The published method multiplies the embeddings and all that is written below the cut
by a. Here all that is written above it is divided by a instead: the same model where every layer reads the stream through a norm,
and one that tied embeddings allow. Of several cuts, each is measured on the model with those below it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradmap_pipeline import (
    Context,
    Estimate,
    Forecasts,
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    Site,
    Stage,
    Streams,
    StreamWork,
    StructureProbe,
    TensorFile,
    find_writers,
    hookimpl,
    magnitude_ratio,
    rescale_stream,
)


class PrunecompCompensate(LayerCompensation):
    """Rescale what is written above each cut, so that hidden states have the magnitude that they had (Prune&Comp)."""

    name = "prunecomp_compensate"

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        probe.find_writers()

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        return costs.two_streams(left.count, samples, tokens, StreamWork())

    def prepare(self, streams: Streams, context: Context) -> dict[str, TensorFile]:
        streams.writers = find_writers(streams.graph, context)
        scales, patches = rescale_stream(streams, magnitude_ratio, context)
        for layer, scale in scales.items():
            context.note(f"the stream is multiplied by {scale:.4g} below layer {layer}")
        return patches

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        return iter(())


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [PrunecompCompensate]
