"""Tell where the processor takes far longer in a narrow type than in float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WIDTH = 384  # of the matrices multiplied
_TRIES = 4
_SLOW = 1.5
"""Times as long as in float32 that is worth a word. With instructions for it a narrow type takes about half."""


def tell_slow_type(device: str, dtype: str) -> str | None:
    """Return a warning for a type that takes far longer than float32 on this processor, and None for any other type.

    Without instructions for bfloat16 or float16, torch takes many times as long in them: less for the products of a pass forward,
    x Wᵀ, than for those of gradients, g W, so that both are timed. Takes less than a second.
    """
    if device != "cpu" or dtype == "float32":
        return None
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of several, one would wait for a core that others use
    try:
        forward, backward = (_compare_types(multiply, dtype) for multiply in (torch.nn.functional.linear, torch.mm))
    finally:
        torch.set_num_threads(threads)
    if max(forward, backward) < _SLOW:
        return None
    return (
        f"this processor is slow in {dtype}: products of matrices take about {_round(forward)} times as long as in float32, those "
        f"for gradients about {_round(backward)} times; --dtype float32 is faster where memory allows it"
    )


def _compare_types(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: str) -> float:
    """Return the time of a product over that in float32. Both run in turn; the least time of each counts, as cores may be busy."""
    import torch

    narrow = torch.ones(_WIDTH, _WIDTH, dtype=getattr(torch, dtype))
    matrices = {"narrow": narrow, "wide": narrow.float()}
    least = dict.fromkeys(matrices, float("inf"))
    for _ in range(_TRIES):
        for name, matrix in matrices.items():
            started = time.perf_counter()
            multiply(matrix, matrix)
            least[name] = min(least[name], time.perf_counter() - started)
    return least["narrow"] / least["wide"]


def _round(ratio: float) -> str:
    """Round to one digit that counts, as `0.7`, `8` or `40`."""
    return f"{float(f'{ratio:.1g}'):g}"
