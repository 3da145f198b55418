"""Folders that other programs load."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..artifacts import Artifact, ExportedFile
from ..checkpoint.forecast import ModelForecast
from ..checkpoint.graph import ModelGraph
from ..checkpoint.model import Model
from ..errors import ModelError, StageError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ..batches import Batch


WEIGHTS = (".safetensors", ".onnx", ".onnx_data", ".gguf")
"""Endings of files that hold weights."""


class ExportForecast(ModelForecast):
    """What a plan knows of an exported folder before anything runs."""

    quantisation: str | None = None

    @classmethod
    def of(cls, model: ModelForecast, **more: Any) -> Self:
        """The forecast of a folder that holds this model. `more`: what is known of the folder besides."""
        return cls(**{**dict(model), **more})


class GgufForecast(ExportForecast):
    """What a plan knows of a GGUF file before anything runs."""

    type: str | None = None
    python: str | None = None
    """The Python with llama-cpp-python that is to run it, or the one that the recipe names for that."""

    def explain_unusable(self) -> str | None:
        return None if self.type is None or _find_runner(self.python) else _explain_no_runner(self.python)


class Export(Artifact):
    """A folder that other programs load, and the model it holds."""

    Forecast = ExportForecast

    graph: ModelGraph
    """The model it was made from."""
    folder: Path
    files: dict[str, ExportedFile]
    max_logit_difference: float | None = None
    """Largest absolute difference between the logits of the folder and of the model it was made from; None: it was not run."""
    quantisation: str | None = None
    """What was done to its weights, for tables: `int8`."""

    def files_by_path(self) -> dict[Path, str]:
        return super().files_by_path() | {self.folder / name: file.sha256 for name, file in self.files.items()}

    @property
    def label(self) -> str:
        """What was done to the model, and the format, for tables."""
        return f"{self.graph.label}, {self.format_name}{f' {self.quantisation}' if self.quantisation else ''}"

    @property
    def format_name(self) -> str:
        """The format, for tables."""
        return type(self).__name__

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(file.size for name, file in self.files.items() if name.endswith(WEIGHTS))


class TransformersFolder(Export, Model):
    """A checkpoint in the Hugging Face format: config, tokenizer, safetensors."""

    format: Literal["safetensors"] = "safetensors"

    @property
    def format_name(self) -> str:
        return "transformers"

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        from ..checkpoint.whole import compute_logits

        return compute_logits(load_folder(self.folder).to(device), device)


class OnnxFolder(Export, Model):
    """One ONNX graph with a cache of keys and values; config and tokenizer beside it."""

    format: Literal["onnx"] = "onnx"
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def format_name(self) -> str:
        return "ONNX" if self.dtype == "float32" else "ONNX fp16"

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        from .ort.session import OnnxSession

        return OnnxSession(self.folder).compute


class GgufFolder(Export, Model):
    """A folder with one GGUF file, for llama.cpp and what is built on it."""

    Forecast = GgufForecast

    format: Literal["gguf"] = "gguf"
    type: str
    """Type of its weights, by llama.cpp's name."""
    python: str | None = None
    """The Python with llama-cpp-python that ran it; None: none was there."""

    @property
    def format_name(self) -> str:
        return "GGUF" if self.quantisation else f"GGUF {self.type}"

    @property
    def file(self) -> Path:
        return self.folder / next(name for name in self.files if name.endswith(".gguf"))

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        from .llamacpp.session import GgufSession

        python = _find_runner(self.python)
        if python is None:
            raise StageError(_explain_no_runner(self.python))
        session = GgufSession(self.file, python)
        return lambda batch: session.run_batch(batch.input_ids)


def _find_runner(python: str | None) -> str | None:
    """The Python that runs GGUF files: this one, where it has llama-cpp-python, else the one that is running."""
    from .llamacpp.pythons import find_runner

    return find_runner([python or sys.executable, sys.executable])


def _explain_no_runner(python: str | None) -> str:
    from .llamacpp.pythons import explain_no_runner

    return explain_no_runner(python or sys.executable)


def load_folder(folder: Path, *, is_whole: bool = False, **options: Any) -> Any:
    """The model in a folder, in the types it is stored in. `is_whole`: with the parts besides the text decoder.

    Raises `StageError` where it cannot be loaded, or a library that it needs is not there.
    """
    from ..checkpoint.pretrained import load_model, name_error

    try:
        return load_model(folder, is_whole=is_whole, **options)
    except ModelError as error:
        raise StageError(str(error)) from error
    except ImportError as error:
        raise StageError(f"{str(folder)!r} cannot be loaded here: {name_error(error).partition(': ')[2]}") from error
