"""Where the graph of an ONNX folder lies, under which name, and what other programs are told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ...errors import StageError

Layout = Literal["flat", "onnx"]
SUBFOLDER = "onnx"
_JS_TYPES = {"float32": "fp32", "float16": "fp16", "int4": "q4", "int8": "int8", "int8_dynamic": "q8"}
"""Names that transformers.js has for types of weights: https://huggingface.co/docs/transformers.js/guides/dtypes"""
_JS_ENDINGS = {"fp32": "", "q8": "_quantized"}
"""Where the ending of a file's name is another than its type."""


def place_graph(layout: Layout, dtype: str, quantisation: str | None = None) -> str:
    """Name of the graph inside its folder. In the layout `onnx` it tells the type of the weights, as transformers.js has it."""
    if layout == "flat":
        return "model.onnx"
    name = _name_type(dtype, quantisation)
    return f"{SUBFOLDER}/model{_JS_ENDINGS.get(name, f'_{name}')}.onnx"


def name_data(graph: str) -> str:
    """Name of the file of weights beside a graph; by this one Optimum and transformers.js look for it."""
    return f"{Path(graph).name}_data"


def is_graph(name: str) -> bool:
    """Whether a file of an ONNX folder, by its name in it, is the graph or its weights."""
    return name.endswith((".onnx", ".onnx_data", ".onnx.data"))


def find_graph(folder: Path) -> Path:
    """The graph in a folder. Raises `StageError` unless there is one."""
    graphs = sorted([*folder.glob("*.onnx"), *folder.glob(f"{SUBFOLDER}/*.onnx")])
    if len(graphs) != 1:
        raise StageError(f"{str(folder)!r} holds {len(graphs)} ONNX graphs instead of one")
    return graphs[0]


def layout_of(folder: Path) -> Layout:
    """The layout of a folder that holds a graph."""
    return "flat" if find_graph(folder).parent == folder else "onnx"


def tell_programs(folder: Path, dtype: str, quantisation: str | None = None) -> None:
    """Say in config.json and genai_config.json where the graph is, and of which type.

    transformers.js takes its first cache's type from there, and chooses the file by the type; Optimum looks through the folder.
    """
    graph = find_graph(folder)
    name = _name_type(dtype, quantisation) if layout_of(folder) == "onnx" else "fp32"
    told: dict[str, Any] = {"dtype": name, "use_external_data_format": (graph.parent / name_data(graph.name)).is_file()}
    if dtype == "float16":
        told["kv_cache_dtype"] = {name: "float16"}
    _update(folder / "config.json", {"transformers.js_config": told})
    genai = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    genai["model"]["decoder"]["filename"] = graph.relative_to(folder).as_posix()
    _update(folder / "genai_config.json", genai)


def _name_type(dtype: str, quantisation: str | None) -> str:
    name = _JS_TYPES[quantisation or dtype]
    return f"{name}f16" if name == "q4" and dtype == "float16" else name


def _update(file: Path, values: dict[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}, indent=2) + "\n", encoding="utf-8")
