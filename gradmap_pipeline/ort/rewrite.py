"""Give every product with a constant matrix the one form that ONNX Runtime's weight quantisers know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def unify_products(model: onnx_ir.Model) -> int:
    """Turn `Gemm(a, B, c)` into `MatMul` and `Add`, and `MatMul(a, Transpose(B))` into `MatMul`; return how many were turned.

    GPT-2 and OPT have Gemm in place of all or some products, and a head tied to the embeddings is a transposed constant.
    """
    import onnx_ir.passes.common as passes

    transposed: dict[str, onnx_ir.Value] = {}
    turned = 0
    for node in list(model.graph):
        parts = _plain_gemm(node) or _product_with_transposed(node)
        if parts is None:
            continue
        matrix, turn, bias = parts
        if turn:
            matrix = _transpose_constant(model, matrix, transposed)
        _replace(model, node, matrix, bias)
        turned += 1
    passes.RemoveUnusedNodesPass()(model)
    return turned


Parts = tuple["onnx_ir.Value", bool, "onnx_ir.Value | None"]
"""A constant matrix, whether it is to be transposed, and what is to be added."""


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


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, matrix: onnx_ir.Value, bias: onnx_ir.Value | None) -> None:
    import onnx_ir
    from onnx_ir import convenience

    new = [onnx_ir.node("MatMul", [node.inputs[0], matrix])]
    if bias is not None:
        new.append(onnx_ir.node("Add", [new[0].outputs[0], bias]))
    result, old = new[-1].outputs[0], node.outputs[0]
    model.graph.insert_before(node, new)
    result.shape, result.type, name = old.shape, old.type, old.name
    convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = name
