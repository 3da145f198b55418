"""GGUF files run by llama.cpp: small models of architectures that place layers by index agree with torch, or are refused.

    GRADMAP_LLAMA_CPP=llama.cpp GRADMAP_LLAMA_CPP_PYTHON=venv/bin/python python -m pytest -m slow tests/test_llama_cpp.py

The first names a folder with llama.cpp's source, the second a Python with llama-cpp-python and what llama.cpp's converter needs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gradmap_plugins.export_gguf import ExportGguf
from walk import make_model

from gradmap_pipeline import OptionError
from gradmap_pipeline.llamacpp import pythons
from gradmap_pipeline.model.graph import open_folder
from gradmap_pipeline.testing import run_stage

LLAMA_CPP = os.environ.get("GRADMAP_LLAMA_CPP")
PYTHON = os.environ.get("GRADMAP_LLAMA_CPP_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LLAMA_CPP and PYTHON), reason="GRADMAP_LLAMA_CPP and GRADMAP_LLAMA_CPP_PYTHON name no llama.cpp"),
]

WITHOUT_WORDS = """
import sys
sys.path.insert(0, {folder!r})
import conversion, convert_hf_to_gguf
def set_vocab(model):
    model._set_vocab_none()
    model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])
conversion.load_all_models()
classes = [conversion.TextModel]
for one in classes:
    one.set_vocab = set_vocab
    classes += one.__subclasses__()
convert_hf_to_gguf.main()
"""
"""llama.cpp's converter, which knows no tokenizer of bytes: files get no tokenizer."""


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    file = tmp_path / "converter" / "convert_hf_to_gguf.py"
    file.parent.mkdir()
    file.write_text(WITHOUT_WORDS.format(folder=LLAMA_CPP))
    (file.parent / "gguf-py").symlink_to(Path(str(LLAMA_CPP)).absolute() / "gguf-py")
    return file


DEPTH = 12
SIZES = {"num_hidden_layers": DEPTH, "max_position_embeddings": 1024}


def cycle(*kinds: Any) -> list[Any]:
    return [kinds[layer % len(kinds)] for layer in range(DEPTH)]


WINDOWS_AT = {period: cycle(*["sliding_attention"] * (period - 1), "full_attention") for period in (2, 4, 6)}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": WINDOWS_AT[2]},
    "gemma3_text": {"layer_types": WINDOWS_AT[6]},
    "gpt_oss": {"layer_types": WINDOWS_AT[2]},
    "cohere2": {"layer_types": WINDOWS_AT[4]},
    "olmo3": {"layer_types": WINDOWS_AT[4]},
    "smollm3": {"layer_types": None, "no_rope_layers": cycle(1, 1, 1, 0), "use_sliding_window": False, "sliding_window": None},
    "lfm2": {"full_attn_idxs": [2, 5, 8, 10]},
    "llama4_text": {
        "layer_types": cycle(*["chunked_attention"] * 3, "full_attention"),
        "no_rope_layers": cycle(1, 1, 1, 0),
        "moe_layers": list(range(1, DEPTH, 2)),
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
        "use_qk_norm": True,
    },
    "qwen2": {"use_sliding_window": True, "max_window_layers": 6},
}


@pytest.mark.parametrize(
    ("model_type", "removed"),
    [
        ("gemma2", [1, 4, 7]),
        ("gemma3_text", [2, 5, 9]),
        ("gpt_oss", [1, 4, 7]),
        ("cohere2", [2, 5]),
        ("olmo3", [2, 5]),
        ("smollm3", [4, 5, 6, 7]),
        ("lfm2", [1, 5, 7]),
        ("llama4_text", [4, 5, 6, 7]),
    ],
)
def test_files_agree_with_torch(model_type: str, removed: list[int], converter: Path, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", model_type, **SIZES, **MODELS[model_type])
    graph = open_folder(base).without_layers(removed)
    stage = ExportGguf(to=tmp_path / "out", converter=converter, python=Path(str(PYTHON)), type="f32")
    exported = run_stage(stage, tmp_path / "step", model=graph).exported
    parity = json.loads((tmp_path / "out" / "gradmap.json").read_text())["llama_cpp"]
    assert parity["lengths"] == [12, 100, 500]
    assert parity["agreeing"] == 1.0
    assert parity["log_probability_difference"] < 1e-3
    assert parity["difference"] == exported.max_logit_difference
    print(model_type, removed, parity)
