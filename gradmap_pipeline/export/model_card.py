"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.graph import ModelGraph
from ..metrics import Metric
from ..text import show
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


def make_model_card(model: ModelGraph, metrics: Sequence[Metric], holding: Holding) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads. `metrics`: of the model before any quantisation."""
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
        lines += ["", "Weights corrected after the removal:", "", *(f"- `{name}`" for name in model.patches)]
        lines += ["", "Names are those of the base model's checkpoint."]
    if holding.quantisation:
        lines += ["", f"Weights quantised: {show(holding.quantisation)}."]
        lines += [f"- {show(detail)}" for detail in holding.details]
    if holding.deviations:
        lines += ["", "What programs compute otherwise:", "", *(f"- {show(deviation)}" for deviation in holding.deviations)]
    if metrics:
        before = " before quantisation" if holding.quantisation else ""
        lines += ["", f"| metric{before} | on | value | standard error | better |", "|---|---|---:|---:|---|"]
        lines += [f"| {' | '.join(_as_cell(cell) for cell in _list_cells(metric))} |" for metric in metrics]
    lines += [
        "",
        *usage_lines(holding.format, files),
        "",
        "How it was made is in `gradmap.json`. Made with gradmap-pipeline, the tool around GradMAP (arXiv:2602.14649).",
        "",
    ]
    return "\n".join(lines)


def _list_cells(metric: Metric) -> list[str]:
    unit = f" {metric.unit}" if metric.unit else ""
    stderr = "" if metric.stderr is None else f"{metric.stderr:.2g}{unit}"
    return [metric.name, metric.place, f"{metric.shown_value}{unit}", stderr, metric.better]


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
