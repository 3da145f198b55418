"""Where an architecture's layers lie in a checkpoint, and the config of one that has lost some."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .depth import prune_fields
from .pretrained import name_generative_class, read_config
from .source import load_config, text_config

_TEXT_PARTS = {"language_model", "text_model"}


def find_layer_prefix(names: Collection[str], layers: int, beyond: int = 0) -> str:
    """The common start of layer tensors: the dotted path whose next parts are 0 … layers-1. There must be one.

    `beyond`: layers that may follow them, which the decoder does not use.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            numbers.setdefault(match[1], set()).add(int(match[2]))
    candidates = [prefix for prefix, indices in numbers.items() if set(range(layers)) <= indices]
    if len(candidates) > 1:  # one of text, among encoders of images or sound
        candidates = [prefix for prefix in candidates if any(part in _TEXT_PARTS for part in prefix.split("."))] or candidates
    if len(candidates) != 1:
        listed = ", ".join(f"{prefix}.* ({len(indices)})" for prefix, indices in sorted(numbers.items())) or "none"
        raise ModelError(f"the checkpoint has no single list of {layers} layers, as its config says; numbered tensors: {listed}")
    further = sorted(numbers[candidates[0]] - set(range(layers + beyond)))
    if further:
        raise ModelError(
            f"the checkpoint has layer {further[0]} ({candidates[0]}.{further[0]}), but its config says {layers} layers"
        )
    return candidates[0]


def layer_of(name: str, prefix: str) -> int | None:
    """The base layer a tensor belongs to."""
    if not name.startswith(prefix + "."):
        return None
    number = name[len(prefix) + 1 :].split(".", 1)[0]
    return int(number) if number.isdigit() else None


def full_config(folder: Path) -> dict[str, Any]:
    """The config of the text decoder in a folder as JSON, with all that its class derives.

    Raises `ModelError` where transformers does not read it.
    """
    return text_config(read_config(folder).to_dict())


def prune_config(folder: Path, kept: Sequence[int]) -> dict[str, Any]:
    """config.json of the model that keeps these base layers. Raises `ModelError` where none can express it."""
    written = load_config(folder)
    generative = name_generative_class(folder)
    if generative is not None:
        written["architectures"] = [generative]
    if isinstance(written.get("text_config"), dict):
        return {**written, "text_config": prune_fields(written["text_config"], full_config(folder), kept)}
    return prune_fields(written, full_config(folder), kept)
