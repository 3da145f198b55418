"""Matrices in 4 or 8 bits: blocks of numbers of one row share a scale and a zero point, `number = (code - zero) * scale`.

Layouts are those of ONNX Runtime's MatMulNBits and GatherBlockQuantized, which read the same bytes:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
Sizes: N rows, K numbers in a row, B blocks in a row, b numbers in a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72)
"""Shares of the range that a block's codes may cover; outliers beyond it are clipped."""
_AT_ONCE = 2**22
"""Numbers that are fitted together, which bounds memory."""


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix."""

    packed: torch.Tensor
    """uint8 (N, B, b * bits / 8): of two codes in a byte, the first has the lower bits. What fills up a row stands for 0."""
    scales: torch.Tensor
    """float16 (N, B)"""
    zeros: torch.Tensor
    """uint8 (N, B)"""
    bits: int
    width: int
    """K"""

    @classmethod
    def make(cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, width: int) -> Blocks:
        """codes uint8 (N, B, b)"""
        return cls(pack(codes, bits), scales, zeros, bits, width)

    @property
    def size(self) -> int:
        """b"""
        return int(self.packed.shape[-1]) * 8 // self.bits

    def dense(self) -> torch.Tensor:
        """The numbers that it stands for, float32 (N, K)."""
        import torch

        codes = self.packed if self.bits == 8 else torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(2)
        numbers = (codes.float() - self.zeros.float()[..., None]) * self.scales.float()[..., None]
        return numbers.flatten(1)[:, : self.width]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (..., n) as bytes (..., ceil(n * bits / 8))."""
    import torch

    if bits == 8:
        return codes
    even = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | even[..., 1::2] << 4


def split_rows(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """A matrix (N, K) as blocks (N, B, size); zeros fill the last one of each row."""
    import torch

    blocks: torch.Tensor = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % size)).unflatten(1, (-1, size))
    return blocks


def quantise_rows(
    matrix: torch.Tensor, bits: int, size: int, weights: torch.Tensor | None = None, *, nearest: bool = False
) -> Blocks:
    """Quantise a matrix (N, K) so that the weighted sum of squared errors in each block is least.

    For each of eight ranges, numbers are rounded, and the scale is fitted to the codes by least squares; the best range of each
    block stays. The range of a block always holds 0. `weights` (K): of the squared errors in each column; None: all alike.
    `nearest`: the scale is that of the whole range, and nothing is fitted.
    """
    import torch

    width = matrix.shape[1]
    weighting = None if weights is None else split_rows(weights.float()[None], size)
    parts = []
    for rows in matrix.split(max(1, _AT_ONCE // width)):
        blocks = split_rows(rows.float(), size)
        scales, zeros = _measure(blocks, bits) if nearest else _fit(blocks, bits, weighting)
        codes = encode(blocks, scales, zeros, bits)
        parts.append((pack(codes, bits), scales.squeeze(-1), zeros.squeeze(-1).to(torch.uint8)))
    packed, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return Blocks(packed, scales, zeros, bits, width)


def encode(blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest codes, uint8, of numbers (..., b). scales, zeros (..., 1). A scale of 0 stands for zeros alone."""
    import torch

    exact = torch.where(scales == 0, 0.0, blocks / scales.float()) + zeros
    return exact.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _measure(blocks: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """scales float16 and zeros float32, both (N, B, 1), for the whole range of blocks (N, B, b)."""
    import torch

    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = torch.where(scales == 0, 0.0, -low / scales.float()).round().clamp(0, 2**bits - 1)
    return scales, zeros


def _fit(blocks: torch.Tensor, bits: int, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, for the range of least weighted error. weights (1, B, b)."""
    import torch

    whole, zeros = _measure(blocks, bits)
    scales, least = whole, torch.full_like(zeros, torch.inf)
    for share in _SHARES if bits < 8 else _SHARES[:1]:
        offsets = encode(blocks, whole.float() * share, zeros, bits).float() - zeros
        weighted = offsets if weights is None else offsets * weights
        length = (weighted * offsets).sum(-1, keepdim=True)
        fitted = torch.where(length == 0, 0.0, (weighted * blocks).sum(-1, keepdim=True) / length).half()
        wrong = (encode(blocks, fitted, zeros, bits).float() - zeros) * fitted.float() - blocks
        error = (wrong * wrong if weights is None else wrong * wrong * weights).sum(-1, keepdim=True)
        scales, least = torch.where(error < least, fitted, scales), torch.minimum(error, least)
    return scales, zeros
