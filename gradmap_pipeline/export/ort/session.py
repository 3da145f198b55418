"""Run an ONNX graph with its cache.

Sizes: B sequences, T new tokens, P tokens in the cache, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StageError, first_line
from .layout import find_graph

if TYPE_CHECKING:
    import torch

    from ...batches import Batch

INSTALL = "pip install 'gradmap-pipeline[onnx]'"


class OnnxSession:
    """A graph that was made by `trace`, opened by ONNX Runtime on the CPU."""

    def __init__(self, folder: Path, *, is_fast: bool = True) -> None:
        """`is_fast`: with a second copy of the weights, laid out for this processor."""
        try:
            import onnxruntime  # type: ignore[import-untyped]
        except ImportError:
            raise StageError(f"ONNX Runtime is not installed; {INSTALL}") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_prepacking", "0" if is_fast else "1")
        import torch

        graph = find_graph(folder)
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has an exception class for each of its status codes
            raise StageError(f"ONNX Runtime cannot open {str(graph)!r}: {first_line(error)}") from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._names = [name for name in self._inputs if name.startswith("past_key_values.")]

    def start(self, rows: int) -> dict[str, Any]:
        """An empty cache."""
        import numpy as np

        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        shapes = {name: (self._inputs[name].shape, dtypes[self._inputs[name].type]) for name in self._names}
        return {name: np.zeros((rows, shape[1], 0, shape[3]), dtype) for name, (shape, dtype) in shapes.items()}

    def run(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits (B, T, V) of new tokens (B, T), and the cache with them. mask (B, P + T)."""
        import torch

        given = {**self._feed(input_ids, mask), **cache}
        outputs = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        kept = {name: outputs["present." + name.removeprefix("past_key_values.")] for name in self._names}
        return torch.from_numpy(outputs["logits"]), kept

    def compute(self, batch: Batch) -> torch.Tensor:
        """Logits (B, T, V) of a batch, without any tokens before it."""
        return self.run(batch.input_ids, batch.mask.long(), self.start(len(batch.input_ids)))[0]

    def watch(self, names: list[str], input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name, for tokens (B, T) without any before them. mask (B, T)."""
        import torch

        outputs = self._session.run(names, {**self._feed(input_ids, mask), **self.start(len(input_ids))})
        return {name: torch.from_numpy(value) for name, value in zip(names, outputs, strict=True)}

    def _feed(self, input_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        feed = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        return {name: value.long().numpy() for name, value in feed.items() if name in self._inputs}
