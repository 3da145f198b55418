"""Folders with an ONNX graph: traced, run beside the model, quantised and compared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts import LINEAGE
from ...errors import StageError
from ...stages.targets import copy_files, describe_folder
from ..agreement import Agreement, compare_models
from ..folders import write_card, write_companions
from .layout import Layout, find_graph, is_graph, layout_of, place_graph, tell_programs
from .session import OnnxSession

if TYPE_CHECKING:
    from ...artifacts import ExportedFile
    from ...batches import Batch
    from ...checkpoint.graph import ModelGraph
    from ...context import Context
    from ..exports import OnnxFolder
    from .quantise import OnnxQuantisation, Quantised


def check_onnx_exportable(model: ModelGraph) -> None:
    """Raise `ModelError` where a model of this architecture cannot be traced to ONNX with a cache of keys and values."""
    from ...checkpoint.pretrained import read_config
    from .trace import check_exportable

    check_exportable(read_config(model.base.folder))


def write_onnx_folder(
    model: ModelGraph, folder: Path, dtype: str, layout: Layout, context: Context
) -> tuple[dict[str, ExportedFile], float]:
    """Write graph, config, tokenizer, licence and model card into an empty folder, and run the graph beside the model.

    Returns the files by name, and the largest absolute difference of logits. torch's weights are gone before ONNX Runtime reads
    its own. Raises `StageError` where the graph computes something else than the model.
    """
    from .apart import write_graph
    from .parity import check_parity

    with context.progress("export to ONNX", 2, "step") as advance:
        graph = folder / place_graph(layout, dtype)
        graph.parent.mkdir(exist_ok=True)
        references, genai = write_graph(model, dtype, context.seed, graph)
        advance()
        difference = check_parity(references, OnnxSession(folder, is_fast=False), dtype)
        advance()
    (folder / "genai_config.json").write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
    write_companions(model, folder)
    tell_programs(folder, dtype)
    write_card(folder, model, context.metrics, "onnx")
    return describe_folder(folder), difference


@dataclass(frozen=True)
class QuantisedGraph:
    """A quantised graph in the making, in a folder of its own, beside the export that it is made from."""

    source: OnnxFolder
    folder: Path

    def write_graph(self, plan: OnnxQuantisation, context: Context) -> Quantised:
        """Write the quantised graph. Raises `StageError` where it has no matrix that ONNX Runtime can quantise."""
        from .quantise import quantise_graph

        graph = self.folder / place_graph(layout_of(self.source.folder), self.source.dtype, plan.method)
        graph.parent.mkdir(exist_ok=True)
        quantised = quantise_graph(find_graph(self.source.folder), graph, plan, context)
        if not quantised.count:
            raise StageError("the graph has no product with a constant matrix that ONNX Runtime can quantise; nothing was written")
        return quantised

    def compare(self, batches: list[Batch], context: Context) -> Agreement:
        """Run both graphs on a text."""
        with context.progress("compare both graphs", len(batches), "batch") as advance:
            before, after = OnnxSession(self.source.folder, is_fast=False), OnnxSession(self.folder)
            return compare_models(before.compute, after.compute, batches, advance)

    def write_companions(self, quantisation: str) -> None:
        """Copy what the export has besides its graph, and say in the configs which graph is here."""
        kept = (name for name in self.source.files if name != LINEAGE and not is_graph(name))
        copy_files(self.source.folder, kept, self.folder)
        tell_programs(self.folder, self.source.dtype, quantisation)
