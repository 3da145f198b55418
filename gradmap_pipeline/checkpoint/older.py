"""Config fields that programs built on transformers 4 read; transformers 5 writes and prefers others.

Without them such programs compute something else and say nothing: `rope_theta` falls back to 10,000.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..errors import ModelError


def add_older_rope(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model in `folder` with its older form, where transformers 5 reads both alike; else as it is.

    Architectures that transformers 4 does not know may take the older fields for something else.
    """
    from .pretrained import read_config

    older = with_older_rope(config)
    read = []
    for content in (config, older):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read.append(getattr(read_config(folder, content).get_text_config(), "rope_parameters", None))
        except ModelError:
            return config
    return older if read[0] == read[1] else config


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `rope_theta`, `rope_scaling` and what else the older form of its `rope_parameters` is."""
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {**config, "text_config": with_older_rope(text)}
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config
    if not any(isinstance(value, dict) for value in parameters.values()):
        return {**_older(parameters), **config}
    added = _older(parameters["full_attention"]) if isinstance(parameters.get("full_attention"), dict) else {}
    local = parameters.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        added["rope_local_base_freq"] = local["rope_theta"]
    return {**added, **config}


def _older(parameters: dict[str, Any]) -> dict[str, Any]:
    """The older form of one set of rotary parameters."""
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    kept: dict[str, Any] = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    return {**kept, "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}
