"""Matrices of a graph to 4 or 8 bits, in the operators that ONNX Runtime computes with: products and tables of embeddings.

A head that is tied to the embeddings keeps one copy: GatherBlockQuantized reads the bytes of MatMulNBits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .blocks import Blocks, pack
from .matrices import DOMAIN, Matrix
from .rewrite import replace_product

if TYPE_CHECKING:
    import onnx_ir

SMALLEST_BLOCK = 16
"""That the operators take."""
_INT8_ACTIVATIONS = 4
"""`accuracy_level`: ONNX Runtime may round activations to 8 bits, block by block, which its fast kernels do."""


def choose_block(matrix: Matrix, wanted: int) -> int | None:
    """The largest size up to the wanted one that divides the rows; None where a table has none: its rows cannot be filled up."""
    size = wanted
    while size >= SMALLEST_BLOCK:
        if matrix.shape[1] % size == 0:
            return size
        size //= 2
    return None if matrix.tables else wanted


def replace_matrices(model: onnx_ir.Model, matrices: Iterable[Matrix], quantised: Iterable[Blocks]) -> None:
    """Put quantised products and tables in the place of those with these matrices."""
    import onnx_ir.passes.common as passes

    for matrix, blocks in zip(matrices, quantised, strict=True):
        _replace(model, matrix, blocks)
    model.graph.opset_imports[DOMAIN] = 1
    passes.RemoveUnusedNodesPass()(model)


def _replace(model: onnx_ir.Model, matrix: Matrix, blocks: Blocks) -> None:
    import numpy as np
    import onnx_ir

    name, (rows, width) = str(matrix.value.name), matrix.shape
    codes = _add_constant(model, f"{name}_codes", blocks.packed.numpy())
    scales = _add_constant(model, f"{name}_scales", blocks.scales.numpy())
    zeros = [_add_constant(model, f"{name}_zeros", pack(blocks.zeros, blocks.bits).numpy())]
    if matrix.type != onnx_ir.DataType.FLOAT16:  # kept in half the bytes, and cast once when the graph is opened
        scales = _compute(model, "Cast", [scales], f"{name}_scales_cast", matrix.type, {"to": int(matrix.type)})
    shared: dict[str, Any] = {"bits": blocks.bits, "block_size": blocks.size}
    for node, bias in matrix.products:
        attributes = {"K": width, "N": rows, "accuracy_level": _INT8_ACTIVATIONS, **shared}
        new = onnx_ir.node("MatMulNBits", [node.inputs[0], codes, scales, *zeros], attributes, domain=DOMAIN)
        replace_product(model, node, new, bias)
    if matrix.tables:
        shape = _add_constant(model, f"{name}_shape", np.array([rows, -1], dtype=np.int64))
        codes = _compute(model, "Reshape", [codes, shape], f"{name}_rows", onnx_ir.DataType.UINT8)
    for node in matrix.tables:
        attributes = {"gather_axis": 0, "quantize_axis": 1, **shared}
        new = onnx_ir.node("GatherBlockQuantized", [codes, node.inputs[1], scales, *zeros], attributes, domain=DOMAIN)
        replace_product(model, node, new, None)


def _add_constant(model: onnx_ir.Model, name: str, array: Any) -> onnx_ir.Value:
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    shape = onnx_ir.Shape(array.shape)
    value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _compute(
    model: onnx_ir.Model,
    operator: str,
    inputs: list[onnx_ir.Value],
    name: str,
    data_type: onnx_ir.DataType,
    attributes: dict[str, Any] | None = None,
) -> onnx_ir.Value:
    """What an operator makes of constants; programs compute it once, when they open the graph."""
    import onnx_ir

    node = onnx_ir.node(operator, inputs, attributes or {})
    model.graph.insert_before(model.graph[0], node)
    result = node.outputs[0]
    result.name, result.type = name, onnx_ir.TensorType(data_type)
    return result
