"""Text for calibration and evaluation: where it comes from, and how it becomes token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .digests import sha256_of_value
from .errors import OptionError, StageError
from .model.graph import LONGEST_DEFAULT_SEQUENCE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from .artifacts import CalibrationSet, ModelForecast
    from .model.graph import BaseCheckpoint, ModelGraph

Packing = Literal["documents", "none"]

_LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SHUFFLE_BUFFER = 1000  # documents
POOL = 8
"""Sequences looked at for each one drawn."""
_ENCODE_TOGETHER = 1 << 17  # characters; few enough that little is made that nobody asks for


class DatasetSource(BaseModel):
    """A text data set: exactly one of `path`, `id` and `builtin`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path | None = Field(None, description="A .txt, .jsonl, .csv or .parquet file, or a folder of one of these kinds.")
    id: str | None = Field(None, description="Data set on the Hugging Face hub, `owner/name`; read as a stream.", min_length=1)
    builtin: Literal["calibration", "heldout"] | None = Field(
        None, description="Text of the running Python's standard library: the part for calibration, or the part held out."
    )
    config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    column: str = Field("text", description="Column that holds the text.")
    revision: str | None = Field(
        None, description="Commit, tag or branch of a hub data set. Without it, changes there go unnoticed."
    )

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSource:
        given = [name for name in ("path", "id", "builtin") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'path', 'id' and 'builtin'; found {' and '.join(map(repr, given)) or 'none'}")
        for name in ("config", "split", "revision"):
            if name in self.model_fields_set and self.id is None:
                raise ValueError(f"{name!r} belongs to a hub data set, given by 'id'")
        if self.builtin is not None and "column" in self.model_fields_set:
            raise ValueError("'column' does not go with 'builtin'")
        if self.path is not None:
            self.files()
        return self

    @property
    def name(self) -> str:
        """As people would say it."""
        if self.id is not None:
            return " ".join(filter(None, (self.id, self.config, self.split)))
        return str(self.path or f"builtin {self.builtin}")

    def files(self) -> list[Path]:
        """The local files, all of one kind."""
        assert self.path is not None
        if not self.path.exists():
            here = str(Path.cwd())
            raise ValueError(f"no file or folder {str(self.path)!r}; relative paths start at the current folder, {here!r}")
        files = [self.path]
        if self.path.is_dir():
            files = sorted(file for file in self.path.iterdir() if file.suffix in _LOADERS)
        kinds = sorted({file.suffix for file in files})
        if not files or kinds[0] not in _LOADERS:
            raise ValueError(f"{str(self.path)!r} is not, and does not hold, a file of the kinds {', '.join(_LOADERS)}")
        if len({_LOADERS[kind] for kind in kinds}) > 1:
            mixed = ", ".join(kinds)
            raise ValueError(f"folder {str(self.path)!r} mixes files of the kinds {mixed}; name one file, or split the folder")
        return files

    def fingerprint(self, digest_of: Callable[[Path], str]) -> Any:
        """What the text depends on, as JSON: part of the key of every step that reads it."""
        if self.builtin is not None:
            from .builtin.text import load_documents

            return {"builtin": sha256_of_value(load_documents(self.builtin))}
        if self.path is not None:
            return {"files": [digest_of(file) for file in self.files()], "column": self.column}
        return self.model_dump(mode="json")

    def documents(self, shuffle_seed: int | None = None) -> Iterator[str]:
        """Stream the texts, shuffled in a buffer when a seed is given."""
        if self.builtin is not None:
            from .builtin.text import load_documents

            texts = load_documents(self.builtin)
            if shuffle_seed is not None:
                import random

                random.Random(shuffle_seed).shuffle(texts)
            yield from texts
            return
        rows = self._open_stream()
        if shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_BUFFER)
        for row in rows:
            if self.column not in row:
                columns = sorted(row)
                raise StageError(f"data set {self.name!r} has no column {self.column!r}; its columns are {columns}; set 'column'")
            text = row[self.column]
            if isinstance(text, str) and text.strip():
                yield text

    def _open_stream(self) -> Any:
        from datasets import load_dataset

        if self.path is not None:
            files = self.files()
            kind = _LOADERS[files[0].suffix]
            how = {"sample_by": "document"} if kind == "text" else {}
            return load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True, **how)
        try:
            return load_dataset(self.id, name=self.config, split=self.split, revision=self.revision, streaming=True)
        except Exception as error:  # the hub client raises a dozen unrelated types for the same user-facing fact
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise StageError(
                f"cannot read data set {self.name!r} from the Hugging Face hub ({type(error).__name__}: {first_line}); "
                "check the name and the network, or use a local file: `dataset: {path: FILE}`"
            ) from error


def check_length(sequence_length: int | None, model: ModelForecast | None) -> int | None:
    """Tokens in a sequence, as far as the plan knows. Raises `OptionError` where that is longer than the model is made for."""
    positions = model.positions if model else None
    if positions and sequence_length and sequence_length > positions:
        found = f"found {sequence_length}, but the model is made for {positions} tokens"
        raise OptionError("sequence_length", f"{found}; accepted: 2 to {positions}")
    if sequence_length or model is None or model.layers is None:
        return sequence_length
    return min(positions or LONGEST_DEFAULT_SEQUENCE, LONGEST_DEFAULT_SEQUENCE)


def load_tokenizer(base: BaseCheckpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    from .model import pretrained

    tokenizer = pretrained.load_tokenizer(base.folder)
    tokenizer.model_max_length = 10**30  # documents are cut into sequences here, not by the tokenizer
    return tokenizer


def check_tokenizer(calibration: CalibrationSet, model: ModelGraph) -> None:
    """Refuse token ids that another model's tokenizer made."""
    if calibration.tokenizer != model.base.tokenizer_sha256:
        raise StageError(f"the calibration set was made with another tokenizer than that of {model.base.name!r}; calibrate on it")


def make_sequences(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str],
    length: int,
    samples: int | None,
    packing: Packing = "documents",
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn texts into (input_ids, attention_mask), both int64 (samples, length).

    `documents` packs texts end to end into full sequences; `none` makes one sequence a text, cut at `length` and
    padded on the right. `samples` None takes all. With a seed, samples are drawn from eight times as many sequences.
    """
    import torch

    sequences: Iterator[list[int]]
    if packing == "documents":
        sequences = _pack(tokenizer, documents, length)
    else:
        sequences = (ids[:length] for ids in _encode(tokenizer, documents) if len(ids) > 1)
    if samples is not None:
        sequences = islice(sequences, samples if seed is None else samples * POOL)
    rows = list(sequences)
    if samples is not None and len(rows) < samples:
        raise StageError(
            f"the data set gives only {len(rows)} of {samples} samples of {length} tokens; "
            "lower 'samples' or 'sequence_length', or use more text"
        )
    if not rows:
        raise StageError(f"the data set gives no sample of {length} tokens; lower 'sequence_length', or use more text")
    if samples is not None and seed is not None:
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:samples]
        rows = [rows[index] for index in chosen.tolist()]
    width = max(map(len, rows))
    padding = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    input_ids = torch.tensor([ids + [padding] * (width - len(ids)) for ids in rows])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows])
    return input_ids, attention_mask


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> Iterator[list[int]]:
    together: list[str] = []
    size = 0
    for document in documents:
        together.append(document)
        size += len(document)
        if size >= _ENCODE_TOGETHER:
            yield from tokenizer(together)["input_ids"]
            together, size = [], 0
    if together:
        yield from tokenizer(together)["input_ids"]


def _pack(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Full sequences only. One starts with BOS where the tokenizer adds it, as the model was trained to expect."""
    start = tokenizer("")["input_ids"][:1]
    starts_with_bos = start == [tokenizer.bos_token_id] and bool(start)
    separator = [] if starts_with_bos or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prefix = start if starts_with_bos else []
    waiting: list[int] = []
    for ids in _encode(tokenizer, documents):
        waiting = [*waiting, *ids, *separator]
        cut = 0
        while True:
            head = [] if waiting[cut : cut + 1] == prefix else prefix
            end = cut + length - len(head)
            if end > len(waiting):
                break
            yield [*head, *waiting[cut:end]]
            cut = end
        waiting = waiting[cut:]
