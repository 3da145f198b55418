"""Names of the columns of local files, read only as far as they are used."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from .files import compression_of, format_of
from .readers import read_objects


def find_columns(file: Path) -> Iterator[list[str]]:
    """Names of columns: of each row in turn where rows may differ, as in JSON, else once.

    Raises `StageError`, or what the system or a library raises, where the file cannot be read.
    """
    file_format = format_of(file)
    if file_format == "json":
        yield from (list(value) for _, value in read_objects(file) if isinstance(value, dict))
    elif file_format == "csv" and compression_of(file) is None:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            yield next(csv.reader(stream), [])
    elif file_format == "parquet":
        from pyarrow import parquet

        yield parquet.read_schema(file).names
    else:
        raise ValueError(f"{str(file)!r} has no columns that are known before it is read")
