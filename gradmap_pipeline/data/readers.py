"""Rows of local files, one at a time, each with its place. What cannot be read is told with the file and the line."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import StageError
from .files import compression_of, format_of

_CHUNK = 1 << 16  # bytes
_ROWS = 256  # of a table in memory at once
_HEADS = {
    codecs.BOM_UTF16_LE: "is text in UTF-16; convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`",
    codecs.BOM_UTF16_BE: "is text in UTF-16; convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`",
    b"\x1f\x8b": "is compressed by gzip; its name must end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; its name must end in .zst",
    b"PAR1": "is a parquet file; its name must end in .parquet",
}
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """What one column holds in one row."""

    value: Any
    place: str
    """`'data.jsonl', line 3`, for messages."""


def read_rows(file: Path, column: str) -> Iterator[Row]:
    """One column of a file of rows. Raises `StageError` with the file and line of what cannot be read."""
    readers: dict[str | None, Callable[[Path, str], Iterator[Row]]] = {
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    with _naming(file):
        yield from readers[format_of(file)](file, column)


def read_text(file: Path) -> Iterator[str]:
    """The text of a file in parts, with every line ending as `\\n`."""
    with _naming(file), _open(file) as stream:
        decoder = codecs.getincrementaldecoder("utf-8")()
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        line, is_first, is_last = 1, True, False
        while not is_last:
            chunk = stream.read(_CHUNK)
            is_last = not chunk
            try:
                decoded = decoder.decode(chunk, final=is_last)
            except UnicodeDecodeError as error:
                raise _not_utf8(file, line + error.object[: error.start].count(b"\n"), error) from None
            line += decoded.count("\n")
            text = newlines.decode(decoded.removeprefix("\ufeff") if is_first else decoded, final=is_last)
            is_first = is_first and not decoded
            if text:
                yield text


def _read_json(file: Path, column: str) -> Iterator[Row]:
    for place, value in read_objects(file):
        if not isinstance(value, dict):
            raise StageError(f"{place}: found {describe(value)}, where each row must be a JSON object, as {{{column!r}: …}}")
        if column not in value:
            raise StageError(f"{place}: {_no_column(column, list(value))}")
        yield Row(value[column], place)


def read_objects(file: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON file, one a line or in one list, each with its place."""
    with _open(file) as stream:
        lines = _decode_lines(file, stream)
        first = next(((number, line) for number, line in lines if line.strip()), None)
        if first is None:
            return
        values = _read_array(file, first, lines) if first[1].lstrip().startswith("[") else _read_lines(file, first, lines)
        for number, value in values:
            yield f"{str(file)!r}, line {number}", value


def _read_lines(file: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    for number, line in _chain(first, lines):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                advice = "each line must be one JSON object, or the file one list of them"
                raise StageError(f"{str(file)!r}, line {number}: this is not valid JSON ({_say(error)}); {advice}") from None


def _read_array(file: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Any]]:
    """The values of one JSON list, read only as far as they are used."""
    decoder = json.JSONDecoder()
    number, text = first[0], first[1].lstrip()
    position, wants_comma, is_first = 1, False, True

    def has_more() -> bool:
        """Take in at least as much text as is held, so that a long value is not tried again for each of its lines."""
        nonlocal number, text, position
        number += text.count("\n", 0, position)
        taken, size = [text[position:]], 0
        position = 0
        for _, line in lines:
            taken.append(line)
            size += len(line)
            if size >= len(taken[0]):
                break
        text = "".join(taken)
        return size > 0

    while True:
        space = _SPACE.match(text, position)
        position = space.end() if space else position
        here = number + text.count("\n", 0, position)
        if position == len(text):
            if not has_more():
                raise StageError(f"{str(file)!r}, line {here}: the list does not end; the file is cut short")
        elif text[position] == "]" and (wants_comma or is_first):
            return
        elif wants_comma:
            if text[position] != ",":
                raise StageError(f"{str(file)!r}, line {here}: this is not valid JSON (a comma or ] is missing)")
            position, wants_comma = position + 1, False
        else:
            try:
                value, end = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not has_more():
                    raise StageError(f"{str(file)!r}, line {here}: this is not valid JSON ({_say(error)})") from None
                continue
            yield here, value
            position, wants_comma, is_first = end, True, False


def _read_csv(file: Path, column: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with _open(file) as stream:
        rows = csv.reader((line for _, line in _decode_lines(file, stream)), strict=True)
        line = 1
        try:
            header = next(rows, [])
            if header.count(column) != 1:
                fault = f"{header.count(column)} columns are named {column!r}" if column in header else _no_column(column, header)
                raise StageError(f"{str(file)!r}, line 1: {fault}; the first line must name the columns")
            index, line = header.index(column), rows.line_num + 1
            for row in rows:
                if row and len(row) != len(header):
                    raise StageError(f"{str(file)!r}, line {line}: found {len(row)} values, but {len(header)} columns")
                if row:
                    yield Row(row[index], f"{str(file)!r}, line {line}")
                line = rows.line_num + 1
        except csv.Error as error:
            raise StageError(f"{str(file)!r}, line {line}: this is not valid CSV ({error})") from None


def _read_parquet(file: Path, column: str) -> Iterator[Row]:
    from pyarrow import parquet

    with file.open("rb") as stream:
        table = parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        if column not in names:
            raise StageError(f"{str(file)!r}: {_no_column(column, names)}")
        yield from _read_batches(file, table.iter_batches(_ROWS, columns=[column], use_threads=False), column)


def _read_arrow(file: Path, column: str) -> Iterator[Row]:
    from pyarrow import ArrowInvalid, ipc

    with file.open("rb") as stream:
        try:
            reader = ipc.open_stream(stream)
            batches = iter(reader)
        except ArrowInvalid:
            stream.seek(0)
            reader = ipc.open_file(stream)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        if column not in reader.schema.names:
            raise StageError(f"{str(file)!r}: {_no_column(column, reader.schema.names)}")
        yield from _read_batches(file, batches, column)


def _read_batches(file: Path, batches: Iterator[Any], column: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            values = batch.column(batch.schema.names.index(column)).slice(start, _ROWS)
            values.validate(full=True)
            for value in values.to_pylist():
                number += 1
                yield Row(value, f"{str(file)!r}, row {number}")


def _open(file: Path) -> IO[bytes]:
    """The bytes of a file, decompressed."""
    compression = compression_of(file)
    if compression is None:
        with file.open("rb") as stream:
            head = stream.read(4)
        for start, said in _HEADS.items():
            if head.startswith(start):
                raise StageError(f"{str(file)!r} {said}")
        return file.open("rb")
    if compression == "gzip":
        return gzip.GzipFile(file)  # type: ignore[return-value]
    if compression == "bz2":
        return bz2.BZ2File(file)
    if compression == "xz":
        return lzma.LZMAFile(file)
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say which file it is that the system or a library cannot read."""
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise StageError(f"{str(file)!r} is no longer there") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise StageError(f"{str(file)!r} is damaged, or not what its name says ({_say(error)})") from error


def _decode_lines(file: Path, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1, and their ends."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(file, number, error) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> StageError:
    byte = f"byte 0x{error.object[error.start]:02X}" if error.start < len(error.object) else "its end"
    advice = "convert the file to UTF-8, as with `iconv -f LATIN1 -t UTF-8`"
    return StageError(f"{str(file)!r}, line {line}: {byte} is not text in UTF-8 ({error.reason}); {advice}")


def describe(value: Any) -> str:
    """What a value of a column is, in words."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        dict: "a mapping",
        list: "a list",
    }
    name = "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
    if isinstance(value, list) and value:
        name += f" of {len(value)} that starts with {describe(value[0])}"
    if isinstance(value, dict):
        name += f" with the keys {_list_names(list(value))}"
    return f"{name} ({value})" if isinstance(value, int | float) else name


def _no_column(column: str, columns: list[str]) -> str:
    return f"has no column {column!r}; its columns are {_list_names(columns)}; set 'column'"


def _list_names(names: list[str]) -> str:
    shown = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, names[:20])]
    return str(shown if len(names) <= 20 else [*shown, "..."])


def _say(error: BaseException) -> str:
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    first_line = (text.strip().splitlines() or [""])[0]
    return (first_line if len(first_line) <= 200 else f"{first_line[:197]}...") or type(error).__name__


def _chain(first: tuple[int, str], lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from lines
