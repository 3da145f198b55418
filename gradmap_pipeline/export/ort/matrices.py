"""The constant matrices of a graph that stand for most of its size: factors of products, and tables that rows are taken from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .rewrite import find_product

if TYPE_CHECKING:
    import onnx_ir
    import torch

DOMAIN = "com.microsoft"
"""Domain of the operators with quantised matrices."""
IDS = "input_ids"
_STEPS_FROM_IDS = 8


@dataclass
class Matrix:
    """A constant (N, K), N outputs or rows of a table, and the nodes that use it in the same orientation."""

    value: onnx_ir.Value
    is_transposed: bool
    """Whether it is stored as (K, N)."""
    products: list[tuple[onnx_ir.Node, onnx_ir.Value | None]] = field(default_factory=list)
    """Products with it, and what each adds to the result."""
    tables: list[onnx_ir.Node] = field(default_factory=list)
    """Nodes that take its rows by token id."""

    @property
    def shape(self) -> tuple[int, int]:
        """N, K"""
        assert self.value.const_value is not None
        first, second = (int(size) for size in self.value.const_value.shape.numpy())
        return (second, first) if self.is_transposed else (first, second)

    @property
    def count(self) -> int:
        """Numbers in it."""
        return self.shape[0] * self.shape[1]

    @property
    def type(self) -> onnx_ir.DataType:
        """Type of its numbers."""
        assert self.value.const_value is not None
        return self.value.const_value.dtype

    def load(self) -> torch.Tensor:
        """Its numbers, float32 (N, K)."""
        import torch

        assert self.value.const_value is not None
        numbers = torch.tensor(self.value.const_value.numpy(), dtype=torch.float32)
        return numbers.T.contiguous() if self.is_transposed else numbers


def find_matrices(model: onnx_ir.Model) -> list[Matrix]:
    """All of them, in the order in which the graph comes to them. A head tied to the embeddings is one with their table."""
    matrices: dict[tuple[str, bool], Matrix] = {}

    def matrix_of(value: onnx_ir.Value, is_transposed: bool) -> Matrix:
        return matrices.setdefault((str(value.name), is_transposed), Matrix(value, is_transposed))

    for node in model.graph:
        product = find_product(node)
        if product is not None:
            value, rows_are_outputs, bias = product
            matrix_of(value, not rows_are_outputs).products.append((node, bias))
        elif _takes_rows_by_id(node):
            table = node.inputs[0]
            assert table is not None
            matrix_of(table, False).tables.append(node)
    return list(matrices.values())


def count_left(model: onnx_ir.Model) -> dict[str, int]:
    """Numbers in each constant matrix of floating-point numbers that is not a scale of a quantised one, by its name."""
    return {
        name: int(value.const_value.size)
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and sum(int(size) > 1 for size in value.const_value.shape.numpy()) > 1
        and not _is_scale(value)
    }


def _is_scale(value: onnx_ir.Value) -> bool:
    users = [
        user for use in value.uses() for user in (use.node.outputs[0].consumers() if use.node.op_type == "Cast" else [use.node])
    ]
    return any(user.domain == DOMAIN for user in users)


def _takes_rows_by_id(node: onnx_ir.Node) -> bool:
    """Whether a node takes rows of a constant matrix by token ids, which may be clipped or masked before."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    table, index = node.inputs[0], node.inputs[1]
    if (
        table is None
        or table.const_value is None
        or len(table.const_value.shape) != 2
        or not table.const_value.dtype.is_floating_point()
    ):
        return False
    for _ in range(_STEPS_FROM_IDS):
        if index is None or index.is_graph_input():
            return index is not None and index.name == IDS
        maker = index.producer()
        if maker is None:
            return False
        index = next((value for value in maker.inputs if value is not None and value.const_value is None), None)
    return False
