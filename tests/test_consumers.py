"""What programs place by index, against formulas of their own sources written out by hand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from consumers_table import describe_placing, describe_run, make_page
from gradmap_plugins.export import ExportModel
from typer.testing import CliRunner
from walk import make_model

from gradmap_pipeline import StageError
from gradmap_pipeline.checkpoint.cadence import is_regular
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.export.consumers import (
    PLACINGS,
    complete_config,
    explain_removal,
    find_misreadings,
    name_programs,
    read_marks,
)
from gradmap_pipeline.export.llamacpp.limits import explain_deviations, explain_refusal, find_arrays
from gradmap_pipeline.testing import run_stage

DEPTH = 12
EVERY = {period: tuple(layer % period == period - 1 for layer in range(DEPTH)) for period in (1, 2, 3, 4, 6)}

FIRST_OF_4 = tuple(layer % 4 == 0 for layer in range(DEPTH))


def windows(period: int, depth: int = DEPTH, name: str = "sliding_attention") -> list[str]:
    return ["full_attention" if layer % period == period - 1 else name for layer in range(depth)]


EXPECTED = {
    ("llama.cpp", "gemma2", "full attention"): ({}, EVERY[2]),
    ("llama.cpp", "gemma3_text", "full attention"): ({"sliding_window_pattern": 2}, EVERY[6]),
    ("llama.cpp", "gpt_oss", "full attention"): ({}, EVERY[2]),
    ("llama.cpp", "cohere2", "full attention"): ({}, EVERY[4]),
    ("llama.cpp", "laguna", "full attention"): ({}, FIRST_OF_4),
    ("llama.cpp", "afmoe", "full attention"): ({}, EVERY[4]),
    ("llama.cpp", "afmoe", "no rotary embedding"): ({}, EVERY[4]),
    ("llama.cpp", "llama4_text", "full attention"): ({}, EVERY[4]),
    ("llama.cpp", "llama4_text", "no rotary embedding"): ({}, EVERY[4]),
    ("llama.cpp", "llama4_text", "experts"): ({"interleave_moe_layer_step": 2}, EVERY[2]),
    ("llama.cpp", "smollm3", "no rotary embedding"): ({"no_rope_layer_interval": 3}, EVERY[4]),
    ("mlx-lm", "gemma3_text", "full attention"): ({"sliding_window_pattern": 3}, EVERY[3]),
    ("mlx-lm", "cohere2", "full attention"): ({}, EVERY[4]),
    ("mlx-lm", "exaone4", "full attention"): ({"sliding_window_pattern": "LLLG"}, EVERY[4]),
    ("mlx-lm", "llama4_text", "full attention"): ({}, EVERY[4]),
    ("mlx-lm", "llama4_text", "no rotary embedding"): ({}, EVERY[4]),
    ("mlx-lm", "llama4_text", "experts"): ({}, EVERY[1]),
    ("mlx-lm", "qwen3_next", "full attention"): ({"full_attention_interval": 3}, EVERY[3]),
    ("mlx-lm", "qwen3_5_text", "full attention"): ({}, EVERY[4]),
    ("SGLang", "gemma2", "full attention"): ({}, EVERY[2]),
    ("SGLang", "llama4_text", "no rotary embedding"): ({}, EVERY[4]),
    ("SGLang", "llama4_text", "experts"): ({"interleave_moe_layer_step": 2}, EVERY[2]),
    ("SGLang", "exaone4", "full attention"): ({"sliding_window_pattern": None}, EVERY[1]),
    ("vLLM", "gpt_oss", "full attention"): ({}, EVERY[2]),
}


@pytest.mark.parametrize("placing", PLACINGS, ids=lambda placing: f"{placing.program}-{placing.types[0]}-{placing.role}")
def test_every_placing_takes_the_layers_of_its_source(placing: Any) -> None:
    config, marks = EXPECTED[placing.program, placing.types[0], placing.role]
    assert placing.compute(config, DEPTH) == marks
    assert placing.version
    assert placing.source.endswith((".cpp", ".py"))


def test_every_placing_has_a_value_to_be_held_to() -> None:
    assert {(placing.program, placing.types[0], placing.role) for placing in PLACINGS} == EXPECTED.keys()


@pytest.mark.parametrize(
    ("config", "role", "marks"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "full attention", (False, True)),
        ({"layer_types": ["linear_attention", "full_attention"]}, "full attention", (False, True)),
        ({"no_rope_layers": [1, 0, 1]}, "no rotary embedding", (False, True, False)),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "no rotary embedding", None),
        ({"layer_types": ["sliding_attention", "full_attention"], "model_type": "afmoe"}, "no rotary embedding", (False, True)),
        ({"moe_layers": [1], "num_hidden_layers": 3}, "experts", (False, True, False)),
        ({"num_hidden_layers": 3}, "experts", None),
        ({}, "full attention", None),
    ],
)
def test_what_a_config_lists(config: dict[str, Any], role: Any, marks: tuple[bool, ...] | None) -> None:
    assert read_marks(config, role) == marks


GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 18, "layer_types": windows(6, 18)}


def test_a_removal_is_explained_by_program() -> None:
    kept = [layer for layer in range(18) if layer not in (2, 5, 9)]
    assert explain_removal(GEMMA3, kept) == [
        "llama.cpp would take layers 5, 11 for those with full attention, where the model has layers 8, 14, unless its file has "
        "'attention.sliding_window_pattern', as files of export_gguf have",
        "mlx-lm would take layers 5, 11 for those with full attention, where the model has layers 8, 14",
    ]
    assert explain_removal(GEMMA3, range(18)) == []
    assert explain_removal(GEMMA3, [*range(12), 12, 13, 14]) == []
    assert explain_removal({**GEMMA3, "model_type": "gemma4_text"}, kept) == []
    assert explain_removal({"model_type": "gemma3_text"}, kept) == []


def test_programs_that_place_by_index() -> None:
    assert name_programs(GEMMA3) == ["llama.cpp", "mlx-lm"]
    assert name_programs({**GEMMA3, "layer_types": ["full_attention"] * 18}) == []
    assert name_programs({"model_type": "llama", "num_hidden_layers": 4}) == []
    assert name_programs({"model_type": "smollm3", "no_rope_layers": [1, 1, 0]}) == ["llama.cpp"]


def test_arrays_of_a_file() -> None:
    other = {**GEMMA3, "num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    assert find_arrays(other) == {"attention.sliding_window_pattern": [True, False, True]}
    assert find_arrays(GEMMA3) == {}
    first = ["full_attention", *["sliding_attention"] * 3] * 2
    assert find_arrays({"model_type": "laguna", "layer_types": first}) == {}
    without = {"model_type": "laguna", "layer_types": [*first[:2], *first[3:]]}
    assert find_arrays(without) == {"attention.sliding_window_pattern": [False, True, True, False, True, True, True]}
    assert explain_refusal(other) is None
    chunks = {"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}
    assert find_arrays(chunks) == {"attention.sliding_window_pattern": [True, False, True]}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 0]}, "would take no layer for those with no rotary embedding"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, None),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "llama.cpp runs qwen2 without windows of attention, which layers 1 have",
        ),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 2}, None),
        (
            {
                "model_type": "gemma2",
                "query_pre_attn_scalar": 144,
                "num_hidden_layers": 40,
                "head_dim": 128,
                "hidden_size": 4608,
                "num_attention_heads": 32,
            },
            "llama.cpp scales attention by 1/sqrt(128) in a gemma2 of 40 layers, where this model has 1/sqrt(144)",
        ),
        (
            {
                "model_type": "gemma2",
                "query_pre_attn_scalar": 144,
                "num_hidden_layers": 46,
                "head_dim": 128,
                "hidden_size": 4608,
                "num_attention_heads": 32,
            },
            None,
        ),
        (
            {"model_type": "exaone4", "num_hidden_layers": 60, "layer_types": windows(4, 60)},
            "exaone4 windows of attention only where it has 64 layers, and this model has 60",
        ),
        ({"model_type": "exaone4", "num_hidden_layers": 64, "layer_types": windows(4, 64)}, None),
        ({"model_type": "gemma3n_text", "num_hidden_layers": 28, "num_kv_shared_layers": 10}, "own, and this model has 18"),
        ({"model_type": "gemma3n_text", "num_hidden_layers": 30, "num_kv_shared_layers": 10}, None),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 26, "q_lora_rank": 1536}, "one of 26 layers for a model without that"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 50, "q_lora_rank": 1536}, None),
        (
            {"model_type": "dots1", "layer_types": ["full_attention", "sliding_attention"]},
            "llama.cpp runs dots1 without windows of attention, which layers 1 have",
        ),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]}, None),
        ({"model_type": "minicpm3", "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256}, None),
        (
            {"model_type": "minicpm3", "scale_depth": 1.4 * (4 / 6) ** 0.5, "scale_emb": 12, "dim_model_base": 256},
            "llama.cpp runs minicpm3 with scale_depth = 1.4, where this model has 1.1431",
        ),
        ({"model_type": "minicpm3", "scale_emb": 1}, "minicpm3 with scale_emb = 12, where this model has 1,"),
        ({"model_type": "cohere", "use_qk_norm": True, "num_hidden_layers": 64}, None),
        (
            {"model_type": "cohere", "use_qk_norm": True, "num_hidden_layers": 60},
            "normalises queries and keys, from 64 on, and this model has such norms and 60 layers",
        ),
        ({"model_type": "cohere", "use_qk_norm": False, "num_hidden_layers": 40}, None),
        (
            {"model_type": "llama4_text", "layer_types": windows(4, 8, "chunked_attention"), "attention_chunk_size": 4096},
            "llama4 with attention_chunk_size = 8192, where this model has 4096",
        ),
    ],
)
def test_what_no_file_can_say(config: dict[str, Any], reason: str | None) -> None:
    refusal = explain_refusal(config)
    assert refusal is None if reason is None else reason in str(refusal)


def test_what_llama_cpp_leaves_out() -> None:
    window = {"model_type": "mistral", "sliding_window": 4096}
    assert explain_deviations(window) == ["llama.cpp has no windows for mistral: beyond 4096 tokens it computes another model"]
    assert explain_deviations({**window, "sliding_window": None}) == []
    assert explain_deviations({**window, "model_type": "llama"}) == []
    listed = {"model_type": "ministral3", "sliding_window": 50, "layer_types": ["sliding_attention"] * 3}
    assert explain_deviations(listed) == ["llama.cpp has no windows for ministral3: beyond 50 tokens it computes another model"]
    assert explain_deviations({**listed, "model_type": "olmo3"}) == []
    yarn = {"rope_type": "yarn", "truncate": False}
    assert "rounds the bounds of YaRN" in explain_deviations({"model_type": "gpt_oss", "rope_parameters": yarn})[0]
    assert explain_deviations({"model_type": "gpt_oss", "rope_parameters": {**yarn, "truncate": True}}) == []


def test_configs_are_completed_where_a_program_places_layers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gemma2")
    written = json.loads((folder / "config.json").read_text())
    written.pop("layer_types")
    (folder / "config.json").write_text(json.dumps(written))
    assert complete_config(written, folder)["layer_types"] == windows(2, 6)
    assert complete_config({"model_type": "llama"}, tmp_path / "nowhere") == {"model_type": "llama"}
    assert find_misreadings(complete_config(written, folder)) == []


def test_check_warns_by_program(tmp_path: Path) -> None:
    from gradmap_pipeline.cli.commands import app

    model = make_model(tmp_path / "model", "gemma3_text", num_hidden_layers=12, layer_types=windows(6))
    steps = [{"use": "prune", "with": {"layers": [1]}}, {"use": "export", "with": {"to": str(tmp_path / "out")}}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    done = CliRunner().invoke(app, ["check", str(recipe)])
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[1] == ("step 'export': mlx-lm would take layer 5 for those with full attention, where the model has layers 4, 10")
    assert lines[0].startswith("step 'export': llama.cpp would take layer 5 for")
    assert lines[2].endswith("no problems in 2 steps")


@pytest.mark.parametrize(
    ("layers", "options", "code", "message"),
    [
        (
            [1],
            {"programs": ["mlx-lm"]},
            2,
            "mlx-lm would take layer 5 for those with full attention, where the model has layers 4, 10",
        ),
        ([1], {"programs": ["SGLang", "vLLM"]}, 0, ""),
        ([0, 1, 2, 3, 4, 5], {"programs": ["mlx-lm", "llama.cpp"]}, 0, ""),
        ([1], {"programs": ["mlx"]}, 2, "accepted: llama.cpp, mlx-lm, SGLang, vLLM"),
        ([1], {"programs": ["mlx-lm"], "format": "onnx"}, 2, "'programs' belongs to format 'safetensors'"),
    ],
)
def test_an_export_is_refused_where_a_program_must_read_it(
    layers: list[int], options: dict[str, Any], code: int, message: str, tmp_path: Path
) -> None:
    from gradmap_pipeline.cli.commands import app

    model = make_model(tmp_path / "model", "gemma3_text", num_hidden_layers=12, layer_types=windows(6))
    steps = [{"use": "prune", "with": {"layers": layers}}, {"use": "export", "with": {"to": str(tmp_path / "out"), **options}}]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"version": 1, "model": {"path": str(model)}, "steps": steps}))
    done = CliRunner().invoke(app, ["check", str(recipe)])
    assert done.exit_code == code
    assert message in " ".join(done.stderr.split())


def test_layers_chosen_by_scores_are_refused_when_they_are_known(tmp_path: Path) -> None:
    graph = open_folder(make_model(tmp_path / "model", "gemma3_text", num_hidden_layers=12, layer_types=windows(6)))
    stage = ExportModel(to=tmp_path / "out", programs=("mlx-lm",))
    with pytest.raises(StageError, match=r"mlx-lm would take layer 5 .*choose layers with"):
        run_stage(stage, tmp_path / "step", model=graph.without_layers([1]))
    assert not (tmp_path / "out").exists()


def test_the_page_of_consumers_is_made_from_its_data() -> None:
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "consumers.json").read_text())
    assert (docs / "consumers.md").read_text() == make_page(rows), "run `make consumers`"
    results = {"agrees", "computes another model", "runs quantised", "refused", "fails"}
    for row in rows:
        assert row["result"] in results or row.get("read"), row
        assert row["figure"], row
        assert row["removed"] == sorted(row["removed"]), row


def test_rows_of_the_page() -> None:
    row = {
        "program": "a", "version": "1", "architecture": "llama", "model": "M", "removed": [], "format": "f", "result": "agrees",
        "figure": "0.1 | 2",
    }  # fmt: skip
    assert describe_run(row) == "| a | 1 | llama | M | none | f | agrees | 0.1 / 2 |"
    assert describe_run({**row, "read": True, "removed": [1, 2]}) == "| a | 1 | llama | M | 1, 2 | f | read: agrees | 0.1 / 2 |"
    by_array, fixed = PLACINGS[0], next(placing for placing in PLACINGS if placing.program == "vLLM")
    assert describe_placing(by_array).endswith(
        "the last of every 2 | GGUF array `attention.sliding_window_pattern` | `src/models/gemma2.cpp` | run |"
    )
    assert describe_placing(fixed).endswith("| not at all | `model_executor/models/gpt_oss.py` | read |")


REGULAR: list[dict[str, Any]] = [
    {"model_type": "gemma2", "layer_types": windows(2)},
    {"model_type": "gemma3_text", "layer_types": windows(6), "sliding_window_pattern": 6},
    {"model_type": "cohere2", "layer_types": windows(4), "sliding_window_pattern": 4},
    {"model_type": "smollm3", "no_rope_layers": [int(layer % 4 != 3) for layer in range(DEPTH)]},
    {"model_type": "laguna", "layer_types": ["sliding_attention" if layer % 4 else "full_attention" for layer in range(DEPTH)]},
]


@pytest.mark.parametrize("listed", REGULAR, ids=lambda listed: str(listed["model_type"]))
def test_a_regular_removal_is_misread_by_none(listed: dict[str, Any]) -> None:
    config = {"num_hidden_layers": DEPTH, **listed}
    selections = list(combinations(range(DEPTH), DEPTH - 4))
    regular = [kept for kept in selections if is_regular(config, DEPTH, kept)]
    assert regular
    assert [kept for kept in regular if explain_removal(config, kept)] == []
    assert any(explain_removal(config, kept) for kept in selections)
