"""Folders that other programs load."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .artifacts import LINEAGE, Artifact, ExportedFile, Model
from .digests import sha256_of
from .errors import StageError
from .model.graph import ModelGraph

if TYPE_CHECKING:
    import torch

    from .model.batches import Batch


class Export(Artifact):
    """A folder that other programs load, and the model it holds."""

    graph: ModelGraph
    """The model it was made from."""
    folder: Path
    files: dict[str, ExportedFile]
    max_logit_difference: float | None = None
    """Largest absolute difference between the logits of the folder and of the model it was made from; None: nobody ran it."""
    quantisation: str | None = None
    """What was done to its weights, for tables: `int8`."""

    def is_present(self) -> bool:
        """Compare names and sizes with the folder, and the lineage, which holds the digests of all other files, by its digest."""
        files = {self.folder / name: file for name, file in self.files.items()}
        same = all(path.is_file() and path.stat().st_size == file.size for path, file in files.items())
        lineage = self.folder / LINEAGE
        return same and (lineage not in files or sha256_of(lineage) == files[lineage].sha256)

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.graph.label}, {self.kind}{f' {self.quantisation}' if self.quantisation else ''}"

    @property
    def kind(self) -> str:
        """The format, for tables."""
        return type(self).__name__

    def count_bytes(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(
            file.size for name, file in self.files.items() if name.endswith((".safetensors", ".onnx", ".onnx.data", ".gguf"))
        )


class TransformersFolder(Export, Model):
    """A checkpoint in the Hugging Face format: config, tokenizer, safetensors."""

    format: Literal["safetensors"] = "safetensors"

    @property
    def kind(self) -> str:
        return "transformers"

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        import torch

        from .model.rope import forget_lengths

        model = load_folder(self.folder, device_map={"": device}).eval()
        forget_lengths(model)

        def run(batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                mask = batch.mask.long().to(device)
                logits: torch.Tensor = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
                return logits

        return run


class OnnxFolder(Export, Model):
    """One ONNX graph with a cache of keys and values; config and tokenizer beside it."""

    format: Literal["onnx"] = "onnx"
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def kind(self) -> str:
        return "ONNX" if self.dtype == "float32" else "ONNX fp16"

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        from .ort.session import OnnxSession

        session = OnnxSession(self.folder)
        return lambda batch: session.run(batch.input_ids, batch.mask.long(), session.start(len(batch.input_ids)))[0]


def load_folder(folder: Path, loader: Any = None, **options: Any) -> Any:
    """`from_pretrained` on a folder, in the types it is stored in, without the bars and warnings that libraries print.

    `loader`: a class of transformers; None: the causal LM. Raises `StageError` where a library that it needs is not there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            return (loader or AutoModelForCausalLM).from_pretrained(folder, dtype="auto", **options)
    except ImportError as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f"{str(folder)!r} cannot be loaded here: {first_line}") from error
    finally:
        logging.set_verbosity(verbosity)
