"""What all stages that correct a pruned model have in common: two streams, one layer after another, patches, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from .artifacts import CalibrationSet, TensorFile, Work
from .errors import ModelError, StageError
from .model.correction import Compensation, CorrectedSite
from .model.graph import ModelGraph
from .model.survey import Survey
from .stage import Context, Stage

if TYPE_CHECKING:
    from .estimate import Estimate
    from .model.sites import Site
    from .model.streams import Streams
    from .rehearsal import Rehearsal

Corrected = tuple[list[CorrectedSite], dict[str, TensorFile]]
"""What was done at one layer, and the patched tensors by name."""


class LayerCompensation(Stage):
    """Base of stages that correct a pruned model; a class derived from it says which layers, and how one is corrected."""

    abstract = True
    parallel = True

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet

    class Outputs(BaseModel):
        model: ModelGraph
        compensation: Compensation
        work: Work

    def choose(self, streams: Streams, known: Mapping[int, Sequence[Site]]) -> Iterator[int]:
        """Layers to correct, in order; each is asked for when the one before it is done. `known`: sites by layer, where tried."""
        raise NotImplementedError

    def correct(self, streams: Streams, layer: int, known: Mapping[int, Sequence[Site]], context: Context) -> Corrected:
        """Correct one layer in the pruned stream. A `NoSiteError` leaves it as it is, and goes on with the next."""
        raise NotImplementedError

    def room(self, graph: ModelGraph) -> int:
        """Bytes that correcting one layer takes."""
        return 0

    def tell(self, site: CorrectedSite) -> str:
        """What was done at one site, in a line."""
        return (
            f"layer {site.layer}: shift {site.shift:.3g} ({site.relative_shift:.1%} of the mean norm), "
            f"{1 - site.missing_left:.1%} of the missing residual restored in {site.parameter}"
        )

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"model": inputs.get("model")}

    def check(self, graph: ModelGraph) -> None:
        """Raise `StageError` where this pruned model cannot be corrected, before either model runs."""

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_layerwise()
        sites = survey.find_sites()
        if sites and not any(self.takes(found) for found in sites.values()):
            raise ModelError(f"no layer has a place that {self.name} could correct: {self.wanted}; use project_compensate")

    wanted: ClassVar[str] = "a linear map that writes to the layer's output"
    """The place that a correction needs, for people."""

    def takes(self, sites: Sequence[Site]) -> bool:
        """Whether a layer with these sites can be corrected."""
        return any(site.kind == "output" for site in sites)

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model, calibration = inputs.get("model"), inputs.get("calibration")
        if model is None or model.layers is None or calibration is None or calibration.sequence_length is None:
            return None
        return self.estimate_streams(model.layers, calibration.samples, calibration.sequence_length, rehearsal)

    def estimate_streams(self, layers: int, samples: int, tokens: int, rehearsal: Rehearsal) -> Estimate:
        """What correcting a model of so many layers takes; here, one more pass of each."""
        return rehearsal.two_streams(layers, samples, tokens, self.room(rehearsal.graph), layers)

    def run(self, inputs: Any, context: Context) -> Any:
        from .data import check_tokenizer
        from .memory import give_back
        from .model.sites import NoSiteError
        from .model.streams import open_streams

        check_tokenizer(inputs.calibration, inputs.model)
        graph: ModelGraph = inputs.model
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to correct; put prune before this step")
        self.check(graph)
        started = time.perf_counter()
        known = Survey(graph, context.memory).find_sites()
        give_back()
        streams = open_streams(graph, inputs.calibration, context, self.room(graph))
        corrected: list[CorrectedSite] = []
        left_out: list[NoSiteError] = []
        patches: dict[str, TensorFile] = {}
        with context.progress("correct layers", len(graph.layers), "layer") as advance:
            for layer in self.choose(streams, known):
                try:
                    done, new = self.correct(streams, layer, known, context)
                except NoSiteError as error:
                    left_out.append(error)
                else:
                    corrected += done
                    patches |= new
                advance()
        if not corrected:
            raise left_out[0] if left_out else StageError("no layer takes this correction")
        for line in [*(f"left as it is: {error}" for error in left_out), *map(self.tell, corrected)]:
            context.note(line)
        shifts = {layer: at.shift for layer, at in streams.measured.items()}
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected), shifts=shifts),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )
