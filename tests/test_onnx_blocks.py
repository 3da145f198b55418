"""Blocks of 4 and 8 bits against their formula in fp64, and the bytes against ONNX Runtime's operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gradmap_pipeline.export.ort.blocks import Blocks, quantise_rows
from gradmap_pipeline.export.ort.gptq import quantise_for_inputs

pytestmark = pytest.mark.full


def make_matrix(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, width, generator=generator)
    matrix[0, 3], matrix[1] = 30.0, 0.0
    return matrix


def unpack_by_formula(blocks: Blocks) -> np.ndarray[Any, Any]:
    """Numbers one by one in fp64: (code - zero) * scale."""
    packed, scales, zeros = blocks.packed.numpy(), blocks.scales.double().numpy(), blocks.zeros.numpy()
    numbers = np.empty((len(packed), blocks.width))
    for row in range(len(packed)):
        for column in range(blocks.width):
            block, place = divmod(column, blocks.size)
            byte = int(packed[row, block, place * blocks.bits // 8])
            code = byte if blocks.bits == 8 else byte >> 4 if place % 2 else byte & 15
            numbers[row, column] = (code - int(zeros[row, block])) * scales[row, block]
    return numbers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "size"), [(64, 32), (40, 16), (32, 32)])
@pytest.mark.parametrize("nearest", [True, False])
def test_blocks_stand_for_their_formula(bits: int, width: int, size: int, nearest: bool) -> None:
    matrix = make_matrix(5, width)
    blocks = quantise_rows(matrix, bits, size, nearest=nearest)
    assert blocks.packed.shape == (5, -(-width // size), size * bits // 8)
    expected = unpack_by_formula(blocks)
    np.testing.assert_allclose(blocks.dense().double().numpy(), expected, rtol=1e-6)
    ranges = [
        max(part.max(), 0.0) - min(part.min(), 0.0)
        for row in matrix.double().numpy()
        for part in np.split(row, range(size, width, size))
    ]
    steps = np.repeat(np.array(ranges).reshape(5, -1), size, axis=1)[:, :width] / (2**bits - 1)
    slack = 0.51 if nearest else 5.0  # clipped outliers are further away
    assert (np.abs(expected - matrix.double().numpy()) <= slack * steps + 1e-9 + 1e-3 * np.abs(matrix.numpy())).all()
    assert (expected[1] == 0).all()


def squared_error(matrix: torch.Tensor, blocks: Blocks, squares: torch.Tensor) -> float:
    wrong = matrix.double().numpy() - unpack_by_formula(blocks)
    return float(np.trace(wrong @ squares.double().numpy() @ wrong.T))


def test_each_rounding_is_better_by_its_own_measure() -> None:
    """Least squares in the numbers; weighted, in the weighted numbers; for inputs, in the products with them."""
    matrix = make_matrix(48, 96)
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(96, 96, generator=generator) * torch.logspace(-1, 1, 96)
    squares = mixing.T @ mixing
    plain, diagonal = torch.eye(96), torch.diag(squares.diagonal())
    nearest, fitted = quantise_rows(matrix, 4, 32, nearest=True), quantise_rows(matrix, 4, 32)
    weighted, made_up = quantise_rows(matrix, 4, 32, squares.diagonal()), quantise_for_inputs(matrix, squares, 4, 32)
    assert squared_error(matrix, fitted, plain) < 0.97 * squared_error(matrix, nearest, plain)
    assert squared_error(matrix, weighted, diagonal) < 0.97 * squared_error(matrix, fitted, diagonal)
    assert squared_error(matrix, made_up, squares) < 0.7 * squared_error(matrix, weighted, squares)


def test_codes_for_inputs_follow_the_paper() -> None:
    """One column after another in fp64, by the inverse of what is left of the sum of squares: equations 2 and 3 of the paper."""
    matrix = make_matrix(3, 48, seed=2)
    inputs = torch.randn(200, 48, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.2, 2, 48)
    squares = inputs.T @ inputs
    blocks = quantise_for_inputs(matrix, squares, 4, 16)
    damped = squares.double().numpy() + 0.01 * float(squares.diagonal().mean()) * np.eye(48)
    scales = np.repeat(blocks.scales.double().numpy(), 16, axis=1)
    zeros = np.repeat(blocks.zeros.double().numpy(), 16, axis=1)
    left, rounded, columns = matrix.double().numpy().copy(), np.empty((3, 48)), list(np.argsort(-squares.diagonal().numpy()))
    while columns:
        inverse = np.linalg.inv(damped[np.ix_(columns, columns)])
        column, *later = columns
        safe = np.where(scales[:, column] == 0, 1.0, scales[:, column])
        code = np.clip(np.round(left[:, column] / safe + zeros[:, column]), 0, 15)
        rounded[:, column] = (code - zeros[:, column]) * scales[:, column]
        error = (left[:, column] - rounded[:, column]) / inverse[0, 0]
        left[:, later] -= np.outer(error, inverse[0, 1:])
        columns = later
    np.testing.assert_allclose(blocks.dense().double().numpy(), rounded, atol=1e-5)


def test_inputs_that_never_come_leave_rounding_to_nearest() -> None:
    matrix = make_matrix(4, 40)
    expected = quantise_rows(matrix, 4, 16)
    assert torch.equal(quantise_for_inputs(matrix, torch.zeros(40, 40), 4, 16).dense(), expected.dense())
    squares = torch.zeros(40, 40)
    squares[0, 0] = 1.0
    blocks = quantise_for_inputs(matrix, squares, 4, 16)
    assert blocks.dense().isfinite().all()
    assert blocks.dense().shape == (4, 40)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "size"), [(64, 32), (48, 16)])
def test_onnx_runtime_reads_the_same_bytes(bits: int, width: int, size: int) -> None:
    """The product and the table of one packed matrix, beside its numbers in fp64."""
    onnx_ir = pytest.importorskip("onnx_ir")
    onnxruntime = pytest.importorskip("onnxruntime")
    from gradmap_pipeline.export.ort.matrices import find_matrices
    from gradmap_pipeline.export.ort.operators import replace_matrices

    matrix = make_matrix(20, width)
    text = (
        '<ir_version: 10, opset_import: ["" : 20]>\n'
        f"tied (int64[b, t] input_ids) => (float[b, t, {width}] rows, float[b, t, 20] logits) {{\n"
        "  rows = Gather<axis = 0>(table, input_ids)\n  turned = Transpose<perm = [1, 0]>(table)\n"
        "  logits = MatMul(rows, turned)\n}"
    )
    import onnx

    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(matrix.numpy(), "table"))
    model = onnx_ir.from_proto(proto)
    (matrix_found,) = find_matrices(model)
    assert (matrix_found.shape, len(matrix_found.products), len(matrix_found.tables)) == ((20, width), 1, 1)
    replace_matrices(model, [matrix_found], [quantise_rows(matrix, bits, size)])
    assert find_matrices(model) == []
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.array([[0, 5, 19], [7, 1, 2]])
    rows, logits = session.run(None, {"input_ids": ids})
    numbers = unpack_by_formula(quantise_rows(matrix, bits, size))
    np.testing.assert_allclose(rows, numbers[ids], rtol=1e-6)
    exact = numbers[ids] @ numbers.T
    assert np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()  # activations are rounded to 8 bits
