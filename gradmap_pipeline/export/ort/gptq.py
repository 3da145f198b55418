"""Codes of a quantised matrix chosen one column after another, each making up for the errors of those before it.

Source: Frantar et al., GPTQ, https://arxiv.org/abs/2210.17323; columns in the order of their inputs' size, as in its `act_order`.
Sizes: N outputs, K inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blocks import Blocks, encode, quantise_rows, split_rows

if TYPE_CHECKING:
    import torch

DAMPING = 0.01
"""Share of the mean square of an input that is added to each: keeps the sum of squares invertible."""
_COLUMNS = 128
"""Columns whose errors are gathered before they go to those further right."""


def quantise_for_inputs(matrix: torch.Tensor, squares: torch.Tensor, bits: int, size: int) -> Blocks:
    """Quantise a matrix (N, K) so that its products with inputs like those seen change least.

    squares (K, K): sum of `x xᵀ` over inputs x. Scales are fitted with each column weighted by its input's square; columns without
    any input are rounded to nearest.
    """
    import torch

    width = matrix.shape[1]
    squares = squares.float()
    seen = squares.diagonal()
    if not bool((seen > 0).any()):
        return quantise_rows(matrix, bits, size)
    fitted = quantise_rows(matrix, bits, size, seen + DAMPING * seen.mean())
    order = seen.argsort(descending=True, stable=True)
    upper = _invert(squares[order][:, order])
    left = matrix.float()[:, order].clone()
    codes = torch.empty(left.shape, dtype=torch.uint8)
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = torch.empty(len(left), end - start)
        for column in range(start, end):
            block = int(order[column]) // size
            scales, zeros = fitted.scales[:, block, None], fitted.zeros[:, block, None].float()
            code = encode(left[:, column, None], scales, zeros, bits)
            codes[:, column] = code[:, 0]
            error = left[:, column] - ((code.float() - zeros) * scales.float())[:, 0]
            error /= upper[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : end] -= error[:, None] * upper[column, column + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    ordered = torch.empty_like(codes)
    ordered[:, order] = codes
    blocks = split_rows(ordered, size)
    if width % size:
        blocks[:, -1, width % size :] = fitted.zeros[:, -1, None]
    return Blocks.make(blocks, fitted.scales, fitted.zeros, bits, width)


def _invert(squares: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with Uᵀ U = (squares + damping)⁻¹, all (K, K)."""
    import torch

    damped = squares.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()
