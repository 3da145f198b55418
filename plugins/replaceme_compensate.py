"""ReplaceMe: the layer before each cut learns, by least squares, to do what the removed layers did.

Source: https://arxiv.org/abs/2505.02819, the closed form (LS): with M the output of the feed-forward part before the cut and R
what is missing after it, A = (MᵀM + λI)⁻¹ Mᵀ(R + M) is multiplied into the down-projection. Of several cuts, each is fitted on the
model with those below it in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from gradmap_pipeline import (
    Context,
    CorrectedSite,
    Estimate,
    LayerCompensation,
    LayersLeft,
    ModelCosts,
    ModelGraph,
    Site,
    Stage,
    Streams,
    StreamWork,
    TensorFile,
    correct_site,
    find_output_site,
    hookimpl,
    layers_before_cuts,
    room_for,
)


class ReplacemeCompensate(LayerCompensation):
    """Multiply the down-projection before each cut by the least-squares stand-in for the removed layers (ReplaceMe)."""

    name = "replaceme_compensate"

    ridge: float = Field(0.0, ge=0, description="λ over the mean diagonal of MᵀM; the factor shrinks towards zero. Published: 0.")

    def room(self, graph: ModelGraph) -> int:
        _, width = graph.map_sizes()
        return room_for(width, width)

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        width, cuts = costs.benchmark.hidden_size, left.count_before_cuts()
        passes = costs.two_streams(left.count, samples, tokens, StreamWork(self.room(costs.graph), cuts, self.goes_up()))
        return passes + costs.speed.correction(width, width, samples * tokens) * cuts

    def check(self, graph: ModelGraph) -> None:
        layers_before_cuts(graph)

    def goes_up(self) -> bool:
        return True

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        yield from layers_before_cuts(streams.graph)

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        site = find_output_site(streams, layer, known)
        done, patches = correct_site(streams, layer, site, context, space="output", ridge=self.ridge, towards="zero")
        return [done], patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ReplacemeCompensate]
