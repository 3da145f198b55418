"""Data sets as recipes name them: local files, the hub, the built-in text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import OptionError, StageError, first_line
from ..machine.digests import sha256_of_value
from .documents import LONG_BYTES, Chat, Document, LongText, make_documents, shuffle_documents
from .files import compression_of, find_files, format_of
from .readers import Row, read_rows, read_text
from .sequences import Packing, count_rows, explain_few

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILTIN_BYTES = 1 << 26
"""More than the sources of Python's standard library hold."""
_SMALL_BYTES = 4 << 20
"""Text of at most so many is tokenised before a run, to see whether it is enough."""
_PLENTY = 8
"""Bytes for each token that is wanted, from which on a text is taken to be enough."""
_TOKENS_A_BYTE = 64
"""More than any tokenizer and chat template make of a byte."""


class DatasetSource(BaseModel):
    """A text data set: exactly one of `path`, `id` and `builtin`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path | None = Field(
        None,
        description="A .txt, .jsonl, .json, .csv, .parquet or .arrow file, or a folder of one of these kinds; "
        "text may be compressed (.gz, .bz2, .xz, .zst).",
    )
    id: str | None = Field(None, description="Data set on the Hugging Face hub, `owner/name`; read as a stream.", min_length=1)
    builtin: Literal["calibration", "heldout"] | None = Field(
        None, description="Text of the running Python's standard library: the part for calibration, or the part held out."
    )
    config: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set.")
    column: str = Field("text", description="Column that holds the text, or chat messages: lists of {role, content}.")
    revision: str | None = Field(
        None, description="Commit, tag or branch of a hub data set. Without it, changes there go unnoticed."
    )

    places: ClassVar[dict[str, str]] = {"path": "path", "id": "id", "builtin": "builtin"}
    """Options of which exactly one says where the text comes from: name in a recipe, and field."""

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSource:
        given = [name for name, at in self.places.items() if getattr(self, at) is not None]
        if len(given) != 1:
            *others, last = map(repr, self.places)
            found = " and ".join(map(repr, given)) or "none"
            raise ValueError(f"give exactly one of {', '.join(others)} and {last}; found {found}")
        for name in ("config", "split", "revision"):
            if name in self.model_fields_set and self.id is None:
                raise ValueError(f"{name!r} belongs to a hub data set, given by 'id'")
        if "column" in self.model_fields_set and given[0] not in ("path", "id"):
            raise ValueError(f"'column' does not go with {given[0]!r}")
        if self.id is not None:
            from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

            validate_repo_id(self.id)
        if self.path is not None:
            self.files()
        return self

    @property
    def name(self) -> str:
        """The name that people would use."""
        if self.id is not None:
            return " ".join(filter(None, (self.id, self.config, self.split)))
        return str(self.path or f"builtin {self.builtin}")

    def files(self) -> list[Path]:
        """The local files, all of one kind. Raises `ValueError`."""
        assert self.path is not None
        return find_files(self.path)

    def check_amount(self, samples: int, length: int | None, packing: str) -> None:
        """Raise `OptionError` where the text, as far as its size is known, cannot give so many samples, whatever the tokenizer."""
        size = self._count_bytes()
        if size is None:
            return
        tokens = samples * (length or 1)
        if samples > size if packing == "none" else tokens > _TOKENS_A_BYTE * size:
            asked = f"{samples:,} samples" + (f" of {length:,} tokens" if length else "")
            raise OptionError(
                "samples",
                f"{asked} are more than the {size:,} bytes of {self.name!r} can give; lower 'samples' or 'sequence_length', or use "
                "more text",
            )

    def _count_bytes(self) -> int | None:
        """Bytes of the text; None where that takes more than a look at files."""
        if self.builtin is not None:
            return _BUILTIN_BYTES
        if self.path is None:
            return None
        files = self.files()
        if any(compression_of(file) or format_of(file) in ("parquet", "arrow") for file in files):
            return None
        return sum(file.stat().st_size for file in files)

    def check_fits_tokenizer(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        """Raise `OptionError` where the first row of local files is a chat that the tokenizer makes no text of.

        Other faults of the data are left to those who read them. `load_tokenizer` is called where the row is a chat.
        """
        if self.path is None or format_of(self.files()[0]) == "text":
            return
        try:
            first = next(self._read_files(None), None)
        except StageError:
            return
        if isinstance(first, Chat):
            try:
                first.render(load_tokenizer())
            except StageError as error:
                raise OptionError("dataset", str(error)) from error

    def check_gives(
        self,
        samples: int,
        length: int,
        packing: Packing,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        is_shuffled: bool = False,
    ) -> None:
        """Raise `OptionError` where a small local text gives fewer samples than so many, by the tokens that it makes.

        Larger texts, and text from elsewhere, are not looked at; faults of the data are left to those who read them.
        """
        size = None if self.path is None else self._count_bytes()
        if size is None or size > _SMALL_BYTES or size >= _PLENTY * samples * length:
            return
        try:
            given = count_rows(load_tokenizer(), self.documents(), length, samples, packing)
        except StageError:
            return
        # Texts in another order may fill one sequence more, where each begins with a BOS token.
        if given + (is_shuffled and packing == "documents") < samples:
            raise OptionError("samples", explain_few(given, samples, length))

    def local_paths(self) -> list[Path]:
        """Files and folders on this machine that are read."""
        return [] if self.path is None else [self.path, *self.files()]

    def fingerprint(self, digest_of: Callable[[Path], str]) -> Any:
        """What the text depends on, as JSON: part of the key of every step that reads it."""
        if self.builtin is not None:
            return {"builtin": _digest_builtin(self.builtin)}
        if self.path is not None:
            files = self.files()
            suffixes = ["".join(file.suffixes[-2:]) if compression_of(file) else file.suffix for file in files]
            return {"files": [digest_of(file) for file in files], "suffixes": suffixes, "column": self.column}
        return self.model_dump(mode="json")

    def documents(self, shuffle_seed: int | None = None) -> Iterator[Document]:
        """Stream the texts and chats, shuffled in a buffer when a seed is given. Raises `StageError`."""
        if self.builtin is not None:
            from ..builtin.text import load_documents

            texts = load_documents(self.builtin)
            if shuffle_seed is not None:
                random.Random(shuffle_seed).shuffle(texts)
            yield from texts
            return
        if self.path is not None:
            documents = self._read_files(shuffle_seed)
            if shuffle_seed is not None:
                documents = shuffle_documents(documents, shuffle_seed)
        else:
            documents = make_documents(self._stream_rows(shuffle_seed))
        is_empty = True
        for document in documents:
            is_empty = False
            yield document
        if is_empty:
            raise StageError(f"data set {self.name!r} holds no text: every row is empty or null")

    def _read_files(self, shuffle_seed: int | None) -> Iterator[Document]:
        files = self.files()
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(files)
        for file in files:
            if format_of(file) != "text":
                yield from make_documents(read_rows(file, self.column))
            elif file.stat().st_size >= LONG_BYTES or compression_of(file):
                if any(part.strip() for part in read_text(file)):
                    yield LongText(file)
            else:
                text = "".join(read_text(file))
                if text.strip():
                    yield text

    def _stream_rows(self, shuffle_seed: int | None) -> Iterator[Row]:
        """Rows from the hub."""
        from datasets import load_dataset

        try:
            rows = load_dataset(self.id, name=self.config, split=self.split, revision=self.revision, streaming=True)
            if shuffle_seed is not None:
                rows = rows.shuffle(seed=shuffle_seed, buffer_size=1000)
            for number, row in enumerate(rows, 1):
                place = f"data set {self.name!r}, row {number}"
                if self.column not in row:
                    raise StageError(f"{place}: has no column {self.column!r}; its columns are {sorted(row)}; set 'column'")
                yield Row(row[self.column], place)
        except StageError:
            raise
        except Exception as error:  # the hub client raises a dozen unrelated types for the same user-facing fact
            raise StageError(
                f"cannot read data set {self.name!r} from the Hugging Face hub ({type(error).__name__}: {first_line(error)}); "
                "check the name and the network, or use a local file: `dataset: {path: FILE}`"
            ) from error


@cache
def _digest_builtin(split: Literal["calibration", "heldout"]) -> str:
    """Digest of the built-in text, which does not change while a process runs."""
    from ..builtin.text import load_documents

    return sha256_of_value(load_documents(split))
