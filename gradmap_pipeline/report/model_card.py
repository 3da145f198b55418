"""The README.md of an exported model."""

from __future__ import annotations

from pathlib import Path

from ..artifacts import Evaluation
from ..model.graph import ModelGraph
from .text import show


def make_model_card(model: ModelGraph, evaluation: Evaluation | None) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads."""
    from_hub = model.base.from_hub
    base = show(model.base.name if from_hub else Path(model.base.name).name)
    metadata = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gradmap, depth-pruning]"]
    if from_hub:
        metadata += [f"base_model: {base}", "base_model_relation: finetune"]
    removed = ", ".join(map(str, model.removed)) or "none"
    lines = [
        *metadata,
        "---",
        "",
        f"# {base}, {len(model.layers)} of {model.base.layers} layers",
        "",
        f"Layers removed, counted from 0: {removed}.",
        f"{model.count_parameters():,} parameters, {model.count_bytes():,} bytes.",
    ]
    if model.patches:
        lines += ["", "Weights corrected after the removal:", "", *(f"- `{name}`" for name in model.patches)]
        lines += ["", "Names are those of the base model's checkpoint."]
    if evaluation:
        lines += [
            "",
            "| text | tokens | perplexity |",
            "|---|---|---|",
            f"| {show(evaluation.dataset)} | {evaluation.tokens:,} | {evaluation.perplexity:.3f} |",
        ]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "How it was made is in `gradmap.json`. Made with gradmap-pipeline, the tool around GradMAP (arXiv:2602.14649).",
        "",
    ]
    return "\n".join(lines)
