"""Add flags by layer to a GGUF file. A program of its own: it runs in the Python that has the `gguf` module.

    python rewrite_gguf.py IN OUT '{"attention.sliding_window_pattern": [true, false]}' [FOLDER OF A gguf MODULE]

Keys come after the architecture's name. All else is copied as it is.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def rewrite(source: str, target: str, arrays: dict[str, list[bool]]) -> None:
    """Copy a file; keys that are there already are replaced."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    architecture = _read(reader, "general.architecture")
    added = {f"{architecture}.{name}": flags for name, flags in arrays.items()}
    writer = GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in {"general.architecture", *added}:
            continue
        element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    for name, flags in added.items():
        writer.add_key_value(name, flags, GGUFValueType.ARRAY, sub_type=GGUFValueType.BOOL)
    for tensor in reader.tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def _read(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise SystemExit(f"the file has no {key!r}")
    return str(field.contents())


if __name__ == "__main__":
    sys.path[1:1] = sys.argv[4:]
    rewrite(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
