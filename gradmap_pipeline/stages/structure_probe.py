"""What stages ask of a model's structure before a run starts, answered without its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..batches import Batch
from ..checkpoint.architecture import full_config
from ..checkpoint.companions import find_tokenizer_files
from ..checkpoint.depth import find_sources
from ..checkpoint.layer_check import check_same_layers
from ..checkpoint.pretrained import check_generation_config, load_tokenizer
from ..errors import ModelError, OptionError, StageError
from ..machine.distributed import ProcessGroup
from ..sweep.shapes import check_tensors

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..correction.sites import Site
    from ..correction.writers import Writer
    from ..sweep.layer_arguments import LayerArguments
    from ..sweep.layerwise import LayerwiseModel

_SHAPE = (2, 8)  # sequences, tokens


@dataclass(frozen=True)
class Room:
    """What a run has for its steps."""

    free: int
    """Bytes on its device, besides what the program has there."""
    dtype: str
    """Floating-point type to compute in."""
    processes: int = 1
    """That do the step together, if it is `parallel`."""


class StructureProbe:
    """A model's structure. Nothing is built before the first question; one that all layers were tried for is answered once."""

    def __init__(self, graph: ModelGraph, memory: int, room: Room | None = None, answers: dict[str, Any] | None = None) -> None:
        """`memory`: bytes that may be used; questions that take more count as answered well.

        `answers`: what an earlier probe of the same model has answered, in JSON by question. New answers are added to it.
        """
        self.graph = graph
        self.room = room
        """What the steps of the run that is about to start may use; None where none is, as in `gradmap check`."""
        self._memory = memory
        self._answers = {} if answers is None else answers

    def _once(self, question: str, find: Callable[[], Any]) -> Any:
        """The answer to a question, in JSON; what `find` raises is no answer, nor is one for which layers were left out."""
        answer = self._answers[question] if question in self._answers else find()
        if self.tries_all:
            self._answers[question] = answer
        return answer

    @cached_property
    def _model(self) -> LayerwiseModel:
        from ..sweep.layerwise import LayerwiseModel
        from ..sweep.weight_sources import RandomWeights

        return LayerwiseModel(self.graph, resident_bytes=0, weights=RandomWeights())

    @cached_property
    def _batch(self) -> Batch:
        import torch

        words = int(self._model.module.config.get_text_config().vocab_size)
        ids = torch.randint(words, _SHAPE, generator=torch.Generator().manual_seed(0))
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool))

    @cached_property
    def _sources(self) -> dict[int, list[int]]:
        return find_sources(full_config(self.graph.base.folder))

    @cached_property
    def tries_all(self) -> bool:
        """Whether no layer is too large to be tried in the memory that may be used."""
        return all(self._fits(elements) for elements in self.graph.layer_elements().values())

    def _fits(self, elements: int) -> bool:
        return 4 * elements < self._memory // 2

    def check_loadable(self) -> None:
        """Raise `ModelError` where tensors are not what the config makes, or tokenizer or generation config cannot be read."""
        self._once("loadable", self._check_loadable)

    def _check_loadable(self) -> None:
        check_generation_config(self.graph.base.folder)
        if find_tokenizer_files(self.graph.base.folder):
            load_tokenizer(self.graph.base.folder)
        elements = self.graph.layer_elements()
        check_tensors(self._model, lambda layer: self._fits(elements[layer]))

    def check_layerwise(self) -> None:
        """Raise `ModelError` where the model cannot be run one layer at a time; tries one layer of each kind."""
        self._once("layerwise", self._check_layerwise)

    def _check_layerwise(self) -> None:
        hidden, arguments = self._model.record(self._batch)
        hidden = self._normal(hidden.shape)
        dependent = {user for users in self._sources.values() for user in users}
        for layer in self._kinds():
            if layer in dependent:
                continue
            with self._model.layer(layer):
                self._model.try_layer(layer, hidden, arguments[layer])

    def check_gradients(self) -> None:
        """Raise `ModelError` where the loss reaches a layer by other ways than hidden states."""
        self._once("gradients", self._check_gradients)

    def _check_gradients(self) -> None:
        self.check_layerwise()
        for source, users in self._sources.items():
            raise ModelError(
                f"layer {source} supplies keys and values to {', '.join(map(str, users))}, so hidden states do not carry all "
                "gradients; list the layers to remove under 'layers' of prune instead of scoring them"
            )

    @property
    def processes(self) -> int:
        """That the run which is about to start does the step with, if it is `parallel`; 1 where none is."""
        return 1 if self.room is None else self.room.processes

    def check_shares(self, batch_size: int) -> None:
        """Raise `OptionError` where the processes of the run cannot take as many samples of a training step each."""
        try:
            ProcessGroup(size=self.processes).split(batch_size)
        except StageError as error:
            raise OptionError("batch_size", str(error)) from None

    def check_removal(self, kept: Sequence[int]) -> None:
        """Raise `ModelError` where no config makes the layers that would be left."""
        self._once(f"without all but {list(kept)}", lambda: check_same_layers(self.graph.base, kept))

    def check_removable(self) -> None:
        """Raise `ModelError` where none of a few single layers can be removed."""
        self._once("removable", self._check_removable)

    def _check_removable(self) -> None:
        layers = self.graph.layers
        inner = [layer for layer in layers[1:-1] if layer not in self._sources] or layers
        refusal: ModelError | None = None
        for layer in dict.fromkeys((inner[len(inner) // 2], inner[0], inner[-1])):
            try:
                self.check_removal([other for other in layers if other != layer])
            except ModelError as error:
                refusal = refusal or error
            else:
                return
        if refusal is not None:
            raise refusal

    def find_sites(self) -> dict[int, tuple[Site, ...]]:
        """Where corrections could go, by layer, in the order in which they write. Without the layers that are too large to try.

        Structure alone decides, in float32 and with made-up weights: in fewer digits, and among the few large values that real
        streams have, what a norm or an expert does to a vector can be lost in rounding.
        """
        from ..correction.sites import Site

        return {layer: tuple(Site(**site) for site in sites) for layer, sites in self._once("sites", self._find_sites)}

    def _find_sites(self) -> list[tuple[int, list[dict[str, Any]]]]:
        from ..correction.site_search import find_sites
        from ..correction.sites import NoSiteError

        sites_by_layer: dict[int, tuple[Site, ...]] = {}
        hidden, arguments = self._model.record(self._batch)
        hidden = self._normal(hidden.shape)
        suppliers = {user: source for source, users in self._sources.items() for user in users}
        for layer, alike in self._kinds().items():
            if layer in suppliers:
                self._run_once(suppliers[layer], hidden, arguments)
            with self._model.layer(layer):
                try:
                    sites = find_sites(self._model, layer, hidden, arguments[layer])
                except NoSiteError:
                    sites = ()
            sites_by_layer |= dict.fromkeys(alike, sites)
        return [(layer, [asdict(site) for site in sites]) for layer, sites in sites_by_layer.items()]

    def find_writers(self) -> dict[int, tuple[Writer, ...]]:
        """The modules that write to the residual stream, by layer. Without the layers that are too large to try.

        Raises `ModelError` where the model depends on the size of the stream, which then cannot be rescaled.
        """
        from ..correction.writers import Writer

        return {layer: tuple(Writer(**writer) for writer in made) for layer, made in self._once("writers", self._find_writers)}

    def _find_writers(self) -> list[tuple[int, list[dict[str, Any]]]]:
        from ..correction.sites import NoSiteError
        from ..correction.writers import check_head, find_writers

        writers: dict[int, tuple[Writer, ...]] = {}
        hidden, arguments = self._model.record(self._batch)
        hidden = self._normal(hidden.shape)
        try:
            check_head(self._model, self._batch, hidden)
            for layer, alike in self._kinds().items():
                with self._model.layer(layer):
                    writers |= dict.fromkeys(alike, find_writers(self._model, layer, hidden, arguments[layer]))
        except NoSiteError as error:
            raise ModelError(str(error)) from None
        return [(layer, [asdict(writer) for writer in made]) for layer, made in writers.items()]

    def _run_once(self, layer: int, hidden: torch.Tensor, arguments: dict[int, LayerArguments]) -> None:
        """Have a layer leave the keys and values that others take from it."""
        import torch

        with self._model.layer(layer), torch.no_grad():
            self._model.run_layer(layer, hidden, arguments[layer])

    def _normal(self, shape: Sequence[int]) -> torch.Tensor:
        import torch

        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))

    def _kinds(self) -> dict[int, list[int]]:
        """Layers that are alike in the names and shapes of their tensors, by the first of them; those that fit into memory."""
        by_signature: dict[object, list[int]] = {}
        elements = self.graph.layer_elements()
        start = len(self.graph.base.layer_prefix) + 1
        for layer in self.graph.layers:
            tensors = self.graph.layer_tensors(layer)
            signature = tuple((name[start:].partition(".")[2], tensor.shape) for name, tensor in tensors.items())
            by_signature.setdefault(signature, []).append(layer)
        return {alike[0]: alike for alike in by_signature.values() if self._fits(elements[alike[0]])}
