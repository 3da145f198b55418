"""A model of transformers without weights: its modules on the meta device, and where its layers are."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def make_config(folder: Path, content: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config in a folder, or what it would be with another content of config.json."""
    from transformers import AutoConfig

    if content is None:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
        return config
    with TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(content))
        try:
            return make_config(Path(place))
        except Exception as error:  # configs are checked by their classes, with errors of many types
            raise ModelError(f"transformers refuses the config: {_first_line(error)}") from error


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The causal LM of a config. Weights are on the meta device; buffers that no checkpoint holds are computed."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32).eval()
        for name, buffer in list(model.named_non_persistent_buffers()):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device=device)
        for module in model.modules():
            for leaf, value in module._parameters.items():
                if value is not None and not value.is_meta:  # made in a way that the context does not see
                    module._parameters[leaf] = torch.nn.Parameter(torch.empty_like(value, device="meta"))
        for parameter in model.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model.initialize_weights()
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError, ImportError) as error:
        raise ModelError(f"transformers cannot build this model: {_first_line(error)}") from error
    return model


def find_layer_list(module: PreTrainedModel, depth: int, layer_prefix: str, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers, and its name: as long as the model is deep, and named as on disk; at `path`, if given."""
    from torch import nn

    leaf = layer_prefix.rpartition(".")[2]
    found = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList)
        and len(child) == depth
        and name.rpartition(".")[2] == leaf
        and (path is None or name == path)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(module).__name__} has {len(found)} lists of {depth} layers named {leaf!r}; "
            "a model whose layers form one list is needed"
        )
    return found[0]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
