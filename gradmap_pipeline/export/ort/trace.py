"""A torch causal LM as one ONNX graph that prefills, decodes and continues.

Names of inputs, outputs and dimensions follow Optimum's convention, by which transformers.js makes its first cache, and which
ONNX Runtime GenAI reads too: https://huggingface.co/docs/optimum-onnx (`past_key_values.0.key`, `batch_size`).
Sizes: B sequences, T new tokens, P tokens in the cache, H heads of keys, E width of a head.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...checkpoint import adapter
from ...errors import ModelError, StageError, first_line

if TYPE_CHECKING:
    import onnx_ir
    import torch
    from torch import nn
    from transformers import PreTrainedModel

OPSET = 20
_SAMPLE = (2, 8, 5)  # sequences, tokens, of which in the cache


def check_exportable(config: Any) -> None:
    """Raise `ModelError` where a layer keeps something else than keys and values of tokens."""
    others = adapter.name_cache_layers(config)
    if others:
        raise ModelError(f"format onnx needs layers that cache keys and values; {len(others)} layers have a {others[0]}")


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the architecture is told where tokens stand."""
    return adapter.takes(model, "position_ids")


def trace(model: PreTrainedModel) -> onnx_ir.Model:
    """Trace a model whose weights are in. The graph shares their memory until it is saved."""
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter  # type: ignore[attr-defined]

    sample = _make_sample(model)
    free = torch.export.Dim.AUTO
    shapes: dict[str, Any] = {name: {0: free, 1: free} for name in ("input_ids", "attention_mask", "position_ids")}
    shapes["past"] = {name: {0: free, 2: free} for name in sample["past"]}
    try:
        with _quiet(), torch.no_grad():
            config = OnnxConfig(dynamic_shapes=shapes, opset_version=OPSET)
            graph: onnx_ir.Model = OnnxExporter().export(_make_flat(model), sample, config).program  # type: ignore[arg-type]
    except Exception as error:  # tracing fails in as many ways as there is Python code
        raise StageError(f"{type(model).__name__} cannot be traced: {type(error).__name__}: {first_line(error)[:300]}") from error
    _name_inputs(graph)
    _name_dimensions(graph)
    _read_batch_from_ids(graph)
    _strip_traces(graph)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tracer says to its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "transformers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _make_flat(model: PreTrainedModel) -> nn.Module:
    """The model as a function of tensors alone."""
    from torch import nn

    positions = takes_positions(model)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: dict[str, Any]) -> dict[str, Any]:
            # Without the config every layer keeps all tokens, so that a window is a mask and no cut in the cache.
            cache = adapter.make_cache([(past[f"{i}.key"], past[f"{i}.value"]) for i in range(len(past) // 2)])
            extra = {"position_ids": position_ids} if positions else {}
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **extra)
            result = {"logits": output.logits}
            for number, (keys, values) in enumerate(adapter.read_cache(output.past_key_values)):
                result[f"present.{number}.key"], result[f"present.{number}.value"] = keys, values
            return result

    return Flat().eval()


def _make_sample(model: PreTrainedModel) -> dict[str, Any]:
    """A continuation of two sequences, one of them padded: of a mask without a zero, the tracer would make a constant."""
    import torch

    rows, tokens, before = _SAMPLE
    words = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(words, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    extra = {"position_ids": positions[:, :before]} if takes_positions(model) else {}
    with torch.no_grad():
        cache = model(
            input_ids=ids[:, :before],
            attention_mask=mask[:, :before],
            past_key_values=adapter.make_cache(),
            use_cache=True,
            **extra,
        ).past_key_values
    past: dict[str, torch.Tensor] = {}
    for number, (keys, values) in enumerate(adapter.read_cache(cache)):
        past[f"{number}.key"], past[f"{number}.value"] = keys, values
    return {"input_ids": ids[:, before:], "attention_mask": mask, "position_ids": positions[:, before:], "past": past}


def _name_inputs(model: onnx_ir.Model) -> None:
    for value in model.graph.inputs:
        name = (value.name or "").removeprefix("input.")
        value.name = "past_key_values." + name.removeprefix("past.") if name.startswith("past.") else name


def _name_dimensions(model: onnx_ir.Model) -> None:
    """Give the dimensions that vary names for people, everywhere; those that do not, numbers. Unknown ones stay unknown."""
    import onnx_ir

    new, past = "sequence_length", "past_sequence_length"
    tokens = {"input_ids": new, "position_ids": new, "attention_mask": f"{past} + {new}"}
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        axes = {0: "batch_size", 1: tokens[value.name]} if value.name in tokens else {0: "batch_size", 2: past}
        for axis, name in axes.items():
            size = value.shape[axis]  # type: ignore[index]
            if not isinstance(size, onnx_ir.SymbolicDim):
                raise StageError(f"the graph takes {value.name!r} with {size} as {name}, and no other number")
            names[str(size.value)] = name

    def rename(size: Any) -> Any:
        if not isinstance(size, onnx_ir.SymbolicDim) or size.value is None:
            return size
        text = re.sub(r"[su]\d+", lambda match: names.get(match[0], match[0]), str(size.value))
        return int(text) if text.isdigit() else text

    values = [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in [*model.graph.inputs, *values]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([rename(size) for size in value.shape])


def _read_batch_from_ids(model: onnx_ir.Model) -> None:
    """Have the graph count its sequences in `input_ids`, which every program gives as they are, and not in the cache."""
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    for node in model.graph.all_nodes():
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or not value.is_graph_input() or not str(value.name).startswith("past_key_values."):
            continue
        if (node.attributes.get_int("start", 0), node.attributes.get_int("end")) == (0, 1):
            node.replace_input_with(0, ids)


def _strip_traces(model: onnx_ir.Model) -> None:
    """Drop the stack traces and paths that a tracer leaves in every node."""
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
            value.metadata_props.clear()
        graph.metadata_props.clear()
    model.metadata_props.clear()
