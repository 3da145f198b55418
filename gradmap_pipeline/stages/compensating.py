"""What all stages that correct a pruned model have in common: two streams, one layer after another, patches, and what it took."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from ..artifacts import TensorFile
from ..checkpoint.graph import ModelGraph
from ..context import Context
from ..correction.correction import Compensation, CorrectedSite
from ..data.calibration_set import CalibrationSet
from ..errors import ModelError, OptionError, PluginError, StageError
from ..machine.distributed import ProcessGroup
from ..sweep.finite import names_of
from ..work import Work
from .forecasts import known
from .ranking import shorten
from .stage import Stage
from .structure_probe import StructureProbe

if TYPE_CHECKING:
    from ..correction.sites import NotFiniteError, Site
    from ..correction.streams import Streams
    from ..correction.writers import Writer
    from ..cost.estimate import Estimate
    from ..cost.layers_left import LayersLeft
    from ..cost.model_costs import ModelCosts
    from .forecasts import Forecasts, Outlook

Corrected = tuple[list[CorrectedSite], dict[str, TensorFile]]
"""What was done at one layer, and the patched tensors by name."""


def check_rescaling(probe: StructureProbe) -> None:
    """Raise `OptionError` where the residual stream of a model cannot be rescaled."""
    try:
        probe.find_writers()
    except ModelError as error:
        raise OptionError("rescale", f"{error}; set it to false") from None


def find_writers(graph: ModelGraph, context: Context) -> dict[int, tuple[Writer, ...]]:
    """What writes to the residual stream of a model, by layer, the same in all processes. Raises `ModelError` where it cannot
    be rescaled."""
    from ..correction.writers import share_writers
    from ..machine.memory import give_back

    writers = StructureProbe(graph, context.memory).find_writers()
    give_back()
    return share_writers(writers, context.group)


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

    def goes_up(self) -> bool:
        """Whether `choose` gives layers from the bottom up, and neither it nor `prepare` or `correct` looks at others.

        Then both models go up side by side, and keep hidden states of the layer that is corrected alone. Else they keep all.
        """
        return False

    def prepare(self, streams: Streams, context: Context) -> dict[str, TensorFile]:
        """Change the pruned stream as a whole before any layer is corrected. Returns the patched tensors by name."""
        return {}

    def room(self, graph: ModelGraph) -> int:
        """Bytes that correcting one layer takes."""
        return 0

    def tell(self, site: CorrectedSite) -> str:
        """What was done at one site, in a line."""
        return (
            f"layer {site.layer}: shift {site.shift:.3g} ({site.relative_shift:.1%} of the mean norm), "
            f"{1 - site.missing_left:.1%} of the missing residual restored in {site.parameter}"
        )

    def forecast(self, inputs: Forecasts) -> Outlook:
        return {"model": inputs.of(ModelGraph)}

    def check(self, graph: ModelGraph) -> None:
        """Raise `StageError` where this pruned model cannot be corrected, before either model runs."""

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        probe.check_layerwise()
        sites = probe.find_sites()
        if sites and not any(self.takes(each) for each in sites.values()):
            raise ModelError(f"no layer has a place that {self.name} could correct: {self.wanted}; use project_compensate")

    wanted: ClassVar[str] = "a linear map that writes to the layer's output"
    """The place that a correction needs, for people."""

    def takes(self, sites: Sequence[Site]) -> bool:
        """Whether a layer with these sites can be corrected."""
        return any(site.role == "output" and not site.norm for site in sites)

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        from ..cost.layers_left import LayersLeft

        text, model = inputs.of(CalibrationSet), inputs.of(ModelGraph)
        left = LayersLeft(costs.graph.layers, known(model.layers), model.kept)
        return self.estimate_streams(left, known(text.samples), known(text.sequence_length), costs)

    def estimate_streams(self, left: LayersLeft, samples: int, tokens: int, costs: ModelCosts) -> Estimate:
        """Estimate the correction of a model of which these layers are left; here, each of them takes one more pass."""
        from ..cost.stream_work import StreamWork

        return costs.two_streams(left.count, samples, tokens, StreamWork(self.room(costs.graph), left.count, self.goes_up()))

    def run(self, inputs: Any, context: Context) -> Any:
        from ..correction.sites import NoSiteError, NotFiniteError, share_sites
        from ..correction.streams import open_streams
        from ..data import check_tokenizer
        from ..machine.memory import give_back

        check_tokenizer(inputs.calibration, inputs.model)
        graph: ModelGraph = inputs.model
        if not graph.removed:
            raise StageError("the model has all its layers, so there is nothing to correct; put prune before this step")
        self.check(graph)
        started = time.perf_counter()
        known = StructureProbe(graph, context.memory).find_sites()
        give_back()
        known = share_sites(known, context.group)
        goes_up = self.goes_up()
        streams = open_streams(graph, inputs.calibration, context, self.room(graph), goes_up=goes_up)
        corrected: list[CorrectedSite] = []
        left_out: dict[int, NoSiteError] = {}
        patches: dict[str, TensorFile] = {}
        tried: set[int] = set()
        try:
            patches |= self.prepare(streams, context)
        except NotFiniteError as error:
            self._refuse(error, streams, context)
        with context.progress("correct layers", len(graph.layers), "layer") as advance:
            for layer in self._choose(streams, known, context.group):
                self._check_chosen(layer, tried, graph)
                tried.add(layer)
                try:
                    advance(streams.go_up_to(layer, context))
                    staying = streams.pruned.model.layer(layer) if goes_up else nullcontext()
                    with context.group.at(f"layer {layer}"), context.group.agreeing(NoSiteError), staying:
                        made = self.correct(streams, layer, known, context)
                except NoSiteError as error:
                    left_out[layer] = error
                except NotFiniteError as error:
                    self._refuse(error, streams, context)
                else:
                    self._check_corrected(made, graph)
                    told = context.group.tell([site.model_dump() for site in made[0]])
                    corrected += [CorrectedSite.model_validate(site) for site in told]
                    patches |= made[1]
                advance()
        if not corrected and not patches:
            raise next(iter(left_out.values()), None) or StageError("no layer takes this correction")
        for line in [*(f"left as it is: {error}" for error in left_out.values()), *map(self.tell, corrected)]:
            context.note(line)
        shifts = {layer: at.shift for layer, at in streams.measured.items()}
        return self.Outputs(
            model=graph.with_patches(patches, "compensated"),
            compensation=Compensation(sites=tuple(corrected), shifts=shifts, scales=streams.list_scales()),
            work=Work(rounds=(streams.work(time.perf_counter() - started),)),
        )

    def _choose(self, streams: Streams, known: Mapping[int, Sequence[Site]], group: ProcessGroup) -> Iterator[int]:
        layers = self.choose(streams, known)
        if not isinstance(layers, Iterable):
            raise PluginError(f"stage {self.name!r}: 'choose' must give layers, got {shorten(layers)}")
        chosen = iter(layers)
        while True:  # the leading process decides, though all choose: a measurement that a choice rests on takes them all
            told: list[int] = group.tell(list(islice(chosen, 1)))
            if not told:
                return
            yield told[0]

    def _check_chosen(self, layer: int, tried: set[int], graph: ModelGraph) -> None:
        """Raise `PluginError` unless `choose` gave a layer of the model that it has not given before, in order."""
        if layer in tried:
            raise PluginError(f"stage {self.name!r}: 'choose' gives layer {layer} twice")
        if layer not in graph.layers:
            raise PluginError(f"stage {self.name!r}: 'choose' gives {shorten(layer)}; the model has {list(graph.layers)}")
        if self.goes_up() and layer < max(tried, default=0):
            raise PluginError(f"stage {self.name!r} goes up, but 'choose' gives layer {layer} after {max(tried)}")

    def _check_corrected(self, made: Any, graph: ModelGraph) -> None:
        """Raise `PluginError` unless `correct` gave what was done and patches of tensors that the model has."""
        from ..checkpoint.checkpoint import read_header

        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], list) and isinstance(made[1], dict)):
            raise PluginError(f"stage {self.name!r}: 'correct' must return a list and a mapping, got {shorten(made)}")
        sites, patches = made
        if not all(isinstance(site, CorrectedSite) for site in sites):
            raise PluginError(f"stage {self.name!r}: 'correct' must return a list of CorrectedSite, got {shorten(sites)}")
        for name, file in patches.items():
            if name not in names_of(graph) or not isinstance(file, TensorFile):
                raise PluginError(
                    f"stage {self.name!r}: 'correct' patches {name!r}, which is not a tensor of the model, in {shorten(file)}"
                )
            shape = graph.stored_tensor(name).shape
            patch = read_header(file.path).get(name)
            if patch is None or patch.shape != shape:
                held = "nothing of that name" if patch is None else f"shape {patch.shape}"
                raise PluginError(f"stage {self.name!r}: the patch of {name!r} must have shape {shape}; its file has {held}")

    def _refuse(self, error: NotFiniteError, streams: Streams, context: Context) -> None:
        """Raise the error that tells why what a correction needs is not finite."""
        from ..machine.memory import give_back
        from ..sweep.finite import explain_nonfinite

        batches = streams.pruned.batches
        give_back()
        graphs = [streams.graph.dense, streams.graph]
        told = explain_nonfinite(str(error), graphs, batches, context.device, context.dtype, context.folder)
        vague = StageError(f"{error} is not a finite number in {context.dtype}")
        context.group.agree(told or vague, is_vague=told is None)
