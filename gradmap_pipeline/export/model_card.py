"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.architecture import layer_of
from ..checkpoint.graph import ModelGraph
from ..metrics import Metric
from ..text import join_ranges, show
from .base_card import carried_metadata
from .card_usage import Format, library_of, usage_lines


@dataclass(frozen=True)
class Holding:
    """What a folder holds, for its card."""

    format: Format
    sizes: Mapping[str, int]
    """Bytes of each file with weights, by its name in the folder."""
    quantisation: str | None = None
    """What was done to the weights: `int4`."""
    details: tuple[str, ...] = ()
    """Sentences about it."""
    deviations: tuple[str, ...] = ()
    """What programs compute otherwise, a sentence each."""
    is_chat: bool = False
    """Whether the tokenizer has a template for chats."""


def make_model_card(model: ModelGraph, metrics: Sequence[Metric], holding: Holding) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads.

    `metrics`: of the model before any quantisation, and of the unpruned one; those of others are left out.
    """
    base = show(model.base.name if model.base.from_hub else Path(model.base.name).name)
    files = tuple(holding.sizes)
    quantised = f", {show(holding.quantisation)}" if holding.quantisation else ""
    lines = [
        *_metadata(model, base, holding),
        "",
        f"# {base}, {len(model.layers)} of {model.base.layers} layers{quantised}",
        "",
        f"Layers removed, counted from 0: {', '.join(map(str, model.removed)) or 'none'}.",
        f"{model.count_parameters():,} parameters, {sum(holding.sizes.values()):,} bytes in "
        f"{', '.join(f'`{show(name)}`' for name in files)}.",
    ]
    if model.patches:
        lines += ["", "Weights changed after the removal, by their names and layers in the base model's checkpoint:", ""]
        lines += [f"- {line}" for line in _list_weights(model)]
    if holding.quantisation:
        lines += ["", f"Weights quantised: {show(holding.quantisation)}."]
        lines += [f"- {show(detail)}" for detail in holding.details]
    if holding.deviations:
        lines += ["", "What programs compute otherwise:", "", *(f"- {show(deviation)}" for deviation in holding.deviations)]
    lines += _list_metrics(model, metrics, " before quantisation" if holding.quantisation else "")
    lines += [
        "",
        *usage_lines(holding.format, files, is_chat=holding.is_chat),
        "",
        "How it was made is in `gradmap.json`. Made with gradmap-pipeline, the tool around GradMAP (arXiv:2602.14649).",
        "",
    ]
    return "\n".join(lines)


def select_metrics(model: ModelGraph, metrics: Sequence[Metric]) -> list[Metric]:
    """Those of the model, each once."""
    return list(dict.fromkeys(metric for metric in metrics if metric.model == model.digest))


def _list_weights(model: ModelGraph) -> list[str]:
    """Changed tensors, a line for all of one name inside their layers."""
    layers: dict[str, list[int]] = {}
    for name in model.patches:
        layer = layer_of(name, model.base.layer_prefix)
        inside = name if layer is None else name.removeprefix(f"{model.base.layer_prefix}.{layer}.")
        layers.setdefault(inside, []).extend([] if layer is None else [layer])
    return [f"`{name}`{f' of layers {join_ranges(numbers)}' if numbers else ''}" for name, numbers in layers.items()]


def _list_metrics(model: ModelGraph, metrics: Sequence[Metric], before: str) -> list[str]:
    """A table with a row for each metric of the model, and what the unpruned one has, if any was measured."""
    own = select_metrics(model, metrics)
    unpruned = {} if model == model.dense else {(one.title, one.setting): one for one in select_metrics(model.dense, metrics)}
    if not own:
        return []
    columns = ["unpruned", f"this model{before}"] if unpruned else [f"this model{before}"]
    lines = ["", f"| metric | on | {' | '.join(columns)} | better |", f"|---|---|{'---:|' * len(columns)}---|"]
    for metric in own:
        values = [unpruned.get((metric.title, metric.setting)), metric] if unpruned else [metric]
        cells = [metric.name, metric.place, *("" if one is None else _show_value(one) for one in values), metric.better]
        lines.append(f"| {' | '.join(map(_as_cell, cells))} |")
    return lines


def _show_value(metric: Metric) -> str:
    return f"{metric.figure} {metric.unit}" if metric.unit else metric.figure


def _as_cell(text: str) -> str:
    return show(text).replace("|", r"\|")


def _metadata(model: ModelGraph, base: str, holding: Holding) -> list[str]:
    tags = [
        "gradmap",
        *(["depth-pruning"] if model.removed else []),
        *([holding.format] if holding.format != "safetensors" else []),
    ]
    lines = ["---", f"library_name: {library_of(holding.format, tuple(holding.sizes))}", "pipeline_tag: text-generation"]
    lines += [f"tags: [{', '.join(tags)}]", *carried_metadata(model.base.folder)]
    if model.base.from_hub:
        lines += [f"base_model: {base}", f"base_model_relation: {'quantized' if holding.quantisation else 'finetune'}"]
    return [*lines, "---"]
