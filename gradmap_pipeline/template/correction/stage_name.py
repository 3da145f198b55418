"""Scale what the layer before each cut writes, by the number that makes up for most of what the removed layers did.

With M what the layer's output map gives and R what is missing behind the cut, both over all tokens, the number is
1 + ⟨M, R⟩ / ⟨M, M⟩: least squares with one unknown. It goes into the weights of the map, so no parameter is new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from gradmap_pipeline import (
    Context,
    CorrectedSite,
    LayerCompensation,
    ModelGraph,
    Moments,
    Site,
    Stage,
    Streams,
    TensorFile,
    collect_moments,
    find_output_site,
    hookimpl,
    layers_before_cuts,
    write_patches,
)


class StageName(LayerCompensation):
    """Scale the output map of the layer before each cut by least squares."""

    name = "stage_name"

    strength: float = Field(1.0, gt=0, le=1, description="Share of the change that is made.")

    def room(self, graph: ModelGraph) -> int:
        _, width = graph.map_sizes()
        return 2 * 8 * width**2  # both sums that `collect_moments` keeps

    def check(self, graph: ModelGraph) -> None:
        layers_before_cuts(graph)

    def goes_up(self) -> bool:
        return True  # hidden states below the layer that is corrected are not needed again

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        yield from layers_before_cuts(streams.graph)

    def correct(
        self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context
    ) -> tuple[list[CorrectedSite], dict[str, TensorFile]]:
        site = find_output_site(streams, layer, known)
        moments, drift = collect_moments(streams, layer, site, "output", context)
        assert isinstance(moments, Moments)  # a linear map has such
        written, along = float(moments.gram.trace()), float(moments.cross.trace())
        change = self.strength * along / max(written, 1e-300)
        with streams.pruned.model.layer(layer) as module:
            parameters = {
                f"{site.name}.{name}": value.detach().double() * (1 + change)
                for name, value in module.get_submodule(site.name).named_parameters()
            }
        patches = write_patches(streams, layer, parameters, context)
        done = CorrectedSite(
            layer=layer,
            parameter=f"{site.name}.weight",
            shift=drift.shift,
            relative_shift=drift.relative_shift,
            missing_left=(moments.missing - 2 * change * along + change**2 * written) / max(moments.missing, 1e-300),
        )
        return [done], patches


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [StageName]
