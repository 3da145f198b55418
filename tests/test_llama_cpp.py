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
from gradmap_plugins.evaluate import Evaluate
from gradmap_plugins.export_gguf import ExportGguf
from gradmap_plugins.quantize_gguf import QuantizeGguf
from walk import make_model

from gradmap_pipeline import GgufFolder, OptionError, QualityError, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.export.llamacpp import limits, pythons
from gradmap_pipeline.testing import make_context, run_stage

LLAMA_CPP = os.environ.get("GRADMAP_LLAMA_CPP")
PYTHON = os.environ.get("GRADMAP_LLAMA_CPP_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (LLAMA_CPP and PYTHON), reason="GRADMAP_LLAMA_CPP and GRADMAP_LLAMA_CPP_PYTHON name no llama.cpp"),
]

WITHOUT_WORDS = """
# --outfile, --outtype, --vocab-only
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


def make_converter(tmp_path: Path) -> Path:
    file = tmp_path / "converter" / "convert_hf_to_gguf.py"
    file.parent.mkdir()
    file.write_text(WITHOUT_WORDS.format(folder=LLAMA_CPP))
    (file.parent / "gguf-py").symlink_to(Path(str(LLAMA_CPP)).absolute() / "gguf-py")
    return file


DEPTH = 12
SIZES = {"num_hidden_layers": DEPTH, "max_position_embeddings": 1024, "vocab_size": 259}


def cycle(*kinds: Any) -> list[Any]:
    return [kinds[layer % len(kinds)] for layer in range(DEPTH)]


WINDOWS_AT = {period: cycle(*["sliding_attention"] * (period - 1), "full_attention") for period in (2, 4, 6)}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"layer_types": WINDOWS_AT[2]},
    "gemma3_text": {"layer_types": WINDOWS_AT[6]},
    "gpt_oss": {"layer_types": WINDOWS_AT[2], "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
    "cohere2": {"layer_types": WINDOWS_AT[4], "rotary_pct": 1.0},
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
    "laguna": {
        "layer_types": cycle("full_attention", *["sliding_attention"] * 3),
        "num_attention_heads_per_layer": None,
        "mlp_layer_types": None,
    },
    "minicpm3": {"scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256},
}


def export(base: Path, removed: list[int], tmp_path: Path, weights: str = "f32") -> GgufFolder:
    graph = open_folder(base).without_layers(removed)
    stage = ExportGguf(to=tmp_path / "out", converter=make_converter(tmp_path), python=Path(str(PYTHON)), type=weights)
    exported: GgufFolder = run_stage(stage, tmp_path / "step", model=graph).exported
    return exported


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
        ("qwen2", [6, 7, 8, 9, 10, 11]),
        ("laguna", [2]),
        ("minicpm3", []),
    ],
)
def test_files_agree_with_torch(model_type: str, removed: list[int], tmp_path: Path) -> None:
    """A removal that leaves the pattern as it is where no file can tell another, any other elsewhere."""
    base = make_model(tmp_path / "base", model_type, **SIZES, **MODELS[model_type])
    exported = export(base, removed, tmp_path)
    parity = json.loads((tmp_path / "out" / "gradmap.json").read_text())["llama_cpp"]
    assert parity["lengths"] == [12, 100, 500]
    assert parity["difference"] == exported.max_logit_difference
    exactness = 1e-5
    if model_type.startswith(("gemma", "minicpm3")):  # a table of GELU in float16; embeddings that are scaled by 12
        exactness = 2e-3
    assert parity["difference"] < exactness
    assert parity["log_probability_difference"] < exactness
    assert parity["lost"] < exactness


@pytest.mark.parametrize(
    ("model_type", "removed", "message"),
    [
        ("smollm3", [2], "would take layers 3, 7 for those with no rotary embedding, where the model has layers 2, 6, 10, and no"),
        ("llama4_text", [2, 3], "would take layers 3, 7 for those with no rotary embedding, where the model has layers 5, 9"),
        ("qwen2", [1], "llama.cpp runs qwen2 without windows of attention, which layers 5, 6, 7, 8, 9, 10 have"),
        ("minicpm3", [1, 2], "llama.cpp runs minicpm3 with scale_depth = 1.4, where this model has 1.278"),
    ],
)
def test_what_no_file_can_say_is_refused(model_type: str, removed: list[int], message: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", model_type, **SIZES, **MODELS[model_type])
    with pytest.raises(OptionError, match=message):
        export(base, removed, tmp_path)


def test_a_file_that_lists_other_windows_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "base", "gemma3_text", **SIZES, **MODELS["gemma3_text"])
    monkeypatch.setattr(limits, "find_arrays", lambda _: {})
    with pytest.raises(StageError, match=r"with a prompt of 12 tokens, logits differ by .* nothing was written"):
        export(base, [2, 5, 9], tmp_path)
    assert not (tmp_path / "out").exists()


def test_rounded_yarn_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    base = make_model(tmp_path / "base", "gpt_oss", **SIZES, layer_types=WINDOWS_AT[2])
    graph = open_folder(base).without_layers([1, 4, 7])
    stage = ExportGguf(to=tmp_path / "out", converter=make_converter(tmp_path), python=Path(str(PYTHON)), type="f32")
    stage.run(stage.Inputs(model=graph), make_context(tmp_path / "step", notes=notes))
    assert any("llama.cpp rounds the bounds of YaRN" in note for note in notes)
    assert json.loads((tmp_path / "out" / "gradmap.json").read_text())["llama_cpp"]["difference"] > 1e-3


def test_perplexity_of_a_file_is_that_of_the_model(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "gemma3_text", **SIZES, **MODELS["gemma3_text"])
    exported = export(base, [2, 5, 9], tmp_path)
    options = {"dataset": {"builtin": "heldout"}, "samples": 3, "sequence_length": 300}
    stage = Evaluate.model_validate(options)
    in_file, meant = (
        run_stage(stage, tmp_path / name, model=model).evaluation for name, model in (("gguf", exported), ("torch", exported.graph))
    )
    assert in_file.tokens == meant.tokens
    assert in_file.perplexity == pytest.approx(meant.perplexity, rel=1e-4)
    assert in_file.label == "pruned, GGUF f32"


@pytest.mark.parametrize("by_program", [False, True])
def test_a_quantised_file_is_run_beside_its_source(by_program: bool, tmp_path: Path) -> None:
    """The program stands in for `llama-quantize`: it takes its arguments, and hands them to llama-cpp-python."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}
    base = make_model(tmp_path / "base", "gemma3_text", **SIZES, **MODELS["gemma3_text"], **sizes)
    source = export(base, [2, 5, 9], tmp_path)
    options: dict[str, Any] = {"python": PYTHON}
    if by_program:
        program = tmp_path / "llama-quantize"
        program.write_text(f'#!/bin/sh\nexec {PYTHON} {pythons.QUANTIZER} "$@"\n')
        program.chmod(0o755)
        options["program"] = program
    for file_type, agreeing, share in (("q8_0", 0.95, 0.3), ("q4_k_m", 0.7, 0.2)):
        stage = QuantizeGguf.model_validate({"to": tmp_path / file_type, "type": file_type, **options})
        made = run_stage(stage, tmp_path / f"step-{file_type}", exported=source)
        assert made.agreement.lengths == (12, 100, 500)
        assert made.agreement.agreeing >= agreeing
        assert 0 < made.agreement.difference == made.exported.max_logit_difference
        assert made.exported.file.stat().st_size < share * source.file.stat().st_size
        lineage = json.loads((tmp_path / file_type / "gradmap.json").read_text())
        assert lineage["llama_cpp"]["agreeing"] == made.agreement.agreeing
        assert lineage["steps"][-1]["stage"] == "quantize_gguf"
    with pytest.raises(
        QualityError, match=r"finds the same token likeliest at 0.\d+ of positions of random prompts, under min_agreement 1"
    ):
        run_stage(
            QuantizeGguf.model_validate({"to": tmp_path / "q2", "type": "q2_k", "min_agreement": 1.0, **options}),
            tmp_path / "step-q2",
            exported=source,
        )
    assert not (tmp_path / "q2").exists()
