"""Rotary position embeddings whose frequencies follow the longest position of a batch, and of batches before it.

transformers chooses the factors of `longrope`, and the base of `dynamic`, by the longest row; `dynamic` keeps them for shorter
rows that follow. What a row gives alone, in a model just loaded, is right: what a batch leaves behind is undone before the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_CACHED = "max_seq_len_cached"


def forget_lengths(model: nn.Module) -> None:
    """Let each call of a model compute its rotary frequencies as the first one does, whatever was called before."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):
            _restore_before_calls(module)


def _restore_before_calls(module: Any) -> None:
    cached = {name: value for name, value in vars(module).items() if name.endswith(_CACHED)}
    buffers = {name: value.clone() for name, value in module.named_buffers(recurse=False) if name.endswith("inv_freq")}
    scaling = getattr(module, "attention_scaling", None)

    def restore(_module: Any, _inputs: Any) -> None:
        for name in [name for name in vars(module) if name.endswith(_CACHED) and name not in cached]:
            delattr(module, name)
        for name, value in cached.items():
            setattr(module, name, value)
        for name, value in buffers.items():
            module.register_buffer(name, value.clone(), persistent=False)
        if scaling is not None:
            module.attention_scaling = scaling

    module.register_forward_pre_hook(restore)
