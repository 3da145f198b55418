"""Give every product with a constant matrix the one form that ONNX Runtime's weight quantisers know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def unify_products(model: onnx_ir.Model) -> int:
    """Turn `Gemm(a, B, c)` into `MatMul` and `Add`, and `MatMul(a, Transpose(B))` into `MatMul`; return how many were turned.

    GPT-2 and OPT have Gemm in place of all or some products, and a head tied to the embeddings is a transposed constant.
    """
    import onnx_ir
    import onnx_ir.passes.common as passes

    transposed: dict[str, onnx_ir.Value] = {}
    turned = 0
    for node in list(model.graph):
        parts = find_product(node)
        if parts is None or _is_plain(node, parts):
            continue
        matrix, turn, bias = parts
        if turn:
            matrix = _transpose_constant(model, matrix, transposed)
        replace_product(model, node, onnx_ir.node("MatMul", [node.inputs[0], matrix]), bias)
        turned += 1
    passes.RemoveUnusedNodesPass()(model)
    return turned


Parts = tuple["onnx_ir.Value", bool, "onnx_ir.Value | None"]
"""A constant matrix, whether its rows are the outputs, so that it must be transposed, and what is added to the product."""


def find_product(node: onnx_ir.Node) -> Parts | None:
    """The parts of `MatMul(a, B)`, `MatMul(a, Transpose(B))` or `Gemm(a, B, c)` with a constant matrix B; None for other nodes."""
    return _plain_gemm(node) or _product_with_transposed(node) or _plain_product(node)


def replace_product(model: onnx_ir.Model, node: onnx_ir.Node, new: onnx_ir.Node, bias: onnx_ir.Value | None) -> None:
    """Put `new`, and the addition after it, in the place of a product."""
    import onnx_ir
    from onnx_ir import convenience

    nodes = [new, *([onnx_ir.node("Add", [new.outputs[0], bias])] if bias is not None else [])]
    result, old = nodes[-1].outputs[0], node.outputs[0]
    model.graph.insert_before(node, nodes)
    result.shape, result.type, name = old.shape, old.type, old.name
    convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = name


def _is_plain(node: onnx_ir.Node, parts: Parts) -> bool:
    return node.op_type == "MatMul" and not parts[1]


def _plain_product(node: onnx_ir.Node) -> Parts | None:
    matrix = node.inputs[1] if node.op_type == "MatMul" else None
    if matrix is None or matrix.const_value is None or len(matrix.const_value.shape) != 2:
        return None
    return matrix, False, None


def _plain_gemm(node: onnx_ir.Node) -> Parts | None:
    attributes = node.attributes
    if node.op_type != "Gemm" or attributes.get_int("transA"):
        return None
    if attributes.get_float("alpha", 1.0) != 1.0 or attributes.get_float("beta", 1.0) != 1.0:
        return None
    matrix = node.inputs[1]
    if matrix is None or matrix.const_value is None:
        return None
    return matrix, bool(attributes.get_int("transB")), node.inputs[2] if len(node.inputs) > 2 else None


def _product_with_transposed(node: onnx_ir.Node) -> Parts | None:
    maker = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
    source = maker.inputs[0] if maker is not None and maker.op_type == "Transpose" else None
    if source is None or source.const_value is None or source.shape is None or len(source.shape) != 2:
        return None
    return source, True, None


def _transpose_constant(model: onnx_ir.Model, matrix: onnx_ir.Value, made: dict[str, onnx_ir.Value]) -> onnx_ir.Value:
    import numpy as np
    import onnx_ir

    assert matrix.const_value is not None
    name = f"{matrix.name}_transposed"
    if name not in made:
        tensor = onnx_ir.tensor(np.ascontiguousarray(matrix.const_value.numpy().T), name=name)
        shape = onnx_ir.Shape(tuple(map(int, tensor.shape.numpy())))
        made[name] = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(made[name])
    return made[name]
