"""What enters the products of a graph on a text: sums of squares, collected while ONNX Runtime runs it.

Sizes: S samples, T tokens, K inputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .layout import name_data
from .matrices import Matrix
from .session import OnnxSession

if TYPE_CHECKING:
    import onnx_ir
    import torch

_BYTES_AT_ONCE = 2**30
"""Most bytes of sums that are collected in one run over the text."""
_TOKENS_AT_ONCE = 256

Squares = dict[str, "torch.Tensor"]


def input_of(matrix: Matrix) -> str | None:
    """Name of the value that a matrix is multiplied with; None where it is a table alone, or there are several."""
    names = {str(node.inputs[0].name) for node, _ in matrix.products if node.inputs[0] is not None}
    return names.pop() if len(names) == 1 else None


def collect_squares(
    model: onnx_ir.Model, matrices: list[Matrix], ids: torch.Tensor, mask: torch.Tensor, folder: Path, advance: Callable[[], None]
) -> Iterator[tuple[list[Matrix], Squares]]:
    """Matrices in groups, each with the sums of `x xᵀ` (K, K), float32, over tokens that are not padding, by name of the input x.

    ids, mask (S, T), padded on the right. The graph is saved to `folder`, with a group's inputs among its outputs.
    `advance` is called for each batch.
    """
    import onnx_ir

    for group in make_groups(matrices):
        names = sorted({name for matrix in group if (name := input_of(matrix)) is not None})
        if not names:
            yield group, {}
            continue
        values = {
            str(value.name): value for matrix in group for node, _ in matrix.products if (value := node.inputs[0]) is not None
        }
        first = len(model.graph.outputs)
        model.graph.outputs.extend(values[name] for name in names)
        graph = folder / "watched.onnx"
        onnx_ir.save(model, graph, external_data=name_data(graph.name))
        del model.graph.outputs[first:]
        yield group, _run(OnnxSession(folder), names, ids, mask, advance)
        for file in folder.iterdir():
            file.unlink()


def make_groups(matrices: list[Matrix], limit: int = _BYTES_AT_ONCE) -> list[list[Matrix]]:
    """In order, as many at a time as have sums of `limit` bytes together."""
    groups: list[list[Matrix]] = [[]]
    names: set[str] = set()
    size = 0
    for matrix in matrices:
        name = input_of(matrix)
        more = 0 if name is None or name in names else 4 * matrix.shape[1] ** 2
        if groups[-1] and size + more > limit:
            groups.append([])
            names, size = set(), 0
            more = 0 if name is None else 4 * matrix.shape[1] ** 2
        groups[-1].append(matrix)
        names |= {name} if name is not None else set()
        size += more
    return groups


def count_batches(matrices: list[Matrix], ids: torch.Tensor) -> int:
    """How often `advance` is called."""
    return len(make_groups(matrices)) * len(_split(ids))


def _run(session: OnnxSession, names: list[str], ids: torch.Tensor, mask: torch.Tensor, advance: Callable[[], None]) -> Squares:
    squares: Squares = {}
    for rows, real in zip(_split(ids), _split(mask), strict=True):
        for name, values in session.watch(names, rows, real).items():
            seen = values[real.bool()].float()
            squares[name] = squares.get(name, 0) + seen.T @ seen
        advance()
    return squares


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    parts: tuple[torch.Tensor, ...] = rows.split(max(1, _TOKENS_AT_ONCE // rows.shape[1]))
    return parts
