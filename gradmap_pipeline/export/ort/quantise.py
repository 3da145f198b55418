"""A graph with its matrices in 4 or 8 bits: which of them, by which rounding, and the file with the result."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .blocks import Blocks, quantise_rows
from .gptq import quantise_for_inputs
from .inputs import collect_squares, count_batches, input_of
from .layout import name_data
from .matrices import Matrix, count_left, find_matrices
from .operators import choose_block, replace_matrices
from .rewrite import unify_products

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from ...context import Context

Rounding = Literal["nearest", "least_squares", "gptq"]


@dataclass(frozen=True)
class OnnxQuantisation:
    """How the matrices of a graph are quantised."""

    method: Literal["int4", "int8", "int8_dynamic"]
    block_size: int
    """Numbers that share a scale, of `int4` and `int8`."""
    rounding: Rounding
    eight_bits: float
    """Largest share of all numbers that stays in 8 bits where the others get 4."""
    text: tuple[torch.Tensor, torch.Tensor] | None
    """Token ids and mask, both (samples, tokens), by which errors are weighed."""


@dataclass(frozen=True)
class Quantised:
    """What was done."""

    count: int
    """Matrices quantised."""
    in_8_bits: int
    left: dict[str, int]
    """Numbers in each matrix that stays as it was, by name."""


def quantise_graph(source: Path, target: Path, how: OnnxQuantisation, context: Context) -> Quantised:
    """Write the quantised graph and its weights beside it."""
    import onnx_ir

    model = onnx_ir.load(source)
    matrices = [matrix for matrix in find_matrices(model) if choose_block(matrix, how.block_size) is not None]
    if how.method == "int8_dynamic":
        matrices = [matrix for matrix in matrices if matrix.tables]
    chosen = _choose(model, matrices, how, context)
    replace_matrices(model, matrices, chosen)
    wide = sum(blocks.bits == 8 for blocks in chosen)
    if how.method == "int8_dynamic":
        unify_products(model)
        before = len(find_matrices(model))
        model = _quantise_dynamically(model, context.folder)
        wide += before - len(find_matrices(model))
    left = count_left(model)
    onnx_ir.save(model, target, external_data=name_data(target.name))
    _clear(context.folder)
    return Quantised(wide + sum(blocks.bits == 4 for blocks in chosen), wide, left)


def _choose(model: onnx_ir.Model, matrices: list[Matrix], how: OnnxQuantisation, context: Context) -> list[Blocks]:
    """Each matrix in its bits. Those whose products would change most in 4 bits, for their size, get 8."""
    if how.method != "int4":
        return [quantise_rows(matrix.load(), 8, _size(matrix, how), nearest=how.rounding == "nearest") for matrix in matrices]
    made: list[tuple[Blocks, float]] = list(_quantise_to_4(model, matrices, how, context))
    room = how.eight_bits * sum(matrix.count for matrix in matrices)
    chosen = [blocks for blocks, _ in made]
    for number in sorted(range(len(matrices)), key=lambda number: made[number][1] / matrices[number].count, reverse=True):
        if matrices[number].count <= room:
            room -= matrices[number].count
            chosen[number] = quantise_rows(matrices[number].load(), 8, _size(matrices[number], how))
    return chosen


def _quantise_to_4(
    model: onnx_ir.Model, matrices: list[Matrix], how: OnnxQuantisation, context: Context
) -> Iterator[tuple[Blocks, float]]:
    """Each matrix in 4 bits, and the relative squared error of its products."""
    if how.text is None:
        for matrix in matrices:
            numbers = matrix.load()
            blocks = quantise_rows(numbers, 4, _size(matrix, how), nearest=how.rounding == "nearest")
            yield blocks, relative_error(numbers, blocks.dense(), None)
        return
    ids, mask = how.text
    units = count_batches(matrices, ids) + len(matrices)
    with context.progress("quantise on the calibration set", units, "batch or matrix") as advance:
        for group, squares in collect_squares(model, matrices, ids, mask, context.folder, advance):
            for matrix in group:
                numbers, seen = matrix.load(), squares.get(input_of(matrix) or "")
                if how.rounding == "gptq" and seen is not None:
                    blocks = quantise_for_inputs(numbers, seen, 4, _size(matrix, how))
                else:
                    blocks = quantise_rows(numbers, 4, _size(matrix, how), nearest=how.rounding == "nearest")
                yield blocks, relative_error(numbers, blocks.dense(), seen)
                advance()


def relative_error(numbers: torch.Tensor, rounded: torch.Tensor, squares: torch.Tensor | None) -> float:
    """Squared error of the products with a matrix (N, K), relative to their squares; without `squares` (K, K), of its numbers."""

    def measure(matrix: torch.Tensor) -> float:
        weighted = matrix if squares is None else matrix @ squares
        return float((weighted * matrix).sum(dtype=weighted.double().dtype))

    whole = measure(numbers)
    return measure(numbers - rounded) / whole if whole > 0 else 0.0


def _size(matrix: Matrix, how: OnnxQuantisation) -> int:
    size = choose_block(matrix, how.block_size)
    assert size is not None
    return size


def _quantise_dynamically(model: onnx_ir.Model, folder: Path) -> onnx_ir.Model:
    """Weights of products to int8 by output channel; activations are quantised while the graph runs."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    plain, quantised = folder / "plain.onnx", folder / "quantised.onnx"
    onnx_ir.save(model, plain, external_data=name_data(plain.name))
    options = {"weight_type": QuantType.QInt8, "per_channel": True, "use_external_data_format": True}
    quantize_dynamic(plain, quantised, op_types_to_quantize=["MatMul"], **options)
    return onnx_ir.load(quantised)


def _clear(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
