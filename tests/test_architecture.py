"""A pruned model's config speaks of the layers that are left, or the removal is refused with the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gradmap_pipeline.checkpoint.architecture import find_layer_prefix, layer_of, prune_config
from gradmap_pipeline.checkpoint.depth import prune_fields
from gradmap_pipeline.errors import ModelError


def write_config(folder: Path, model_type: str, **fields: Any) -> Path:
    config = AutoConfig.for_model(model_type, num_hidden_layers=6, **fields).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_plain_config_changes_its_depth_alone(tmp_path: Path) -> None:
    written = json.loads((write_config(tmp_path, "llama") / "config.json").read_text())
    assert prune_config(tmp_path, [0, 2, 5]) == {**written, "num_hidden_layers": 3}
    assert prune_config(tmp_path, range(6)) == written


def test_lists_by_layer_are_sliced_even_if_derived(tmp_path: Path) -> None:
    """Qwen3 derives layer_types from its depth: a pruned config must not derive them anew."""
    write_config(tmp_path, "qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    written = json.loads((tmp_path / "config.json").read_text())
    kinds = written.pop("layer_types")
    assert kinds == ["full_attention"] * 3 + ["sliding_attention"] * 3
    (tmp_path / "config.json").write_text(json.dumps(written))
    pruned = prune_config(tmp_path, [0, 2, 3, 5])
    assert pruned["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert pruned["max_window_layers"] == 2


def test_indices_are_renumbered(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_moe", mlp_only_layers=[0, 4])
    assert prune_config(tmp_path, [1, 3, 4, 5])["mlp_only_layers"] == [2]


def test_counts_from_the_top_and_maps_by_index(tmp_path: Path) -> None:
    written = {
        "model_type": "llama",
        "num_hidden_layers": 6,
        "num_nextn_predict_layers": 1,
        "per_layer_config": {"00": {"a": 1}, "03": {"a": 2}, "05": {"a": 3}},
        "block_types": ["recurrent", "attention"],
        "scale_depth": 1.2,
        "ple_layer_ids": [1, 4],
    }
    pruned = prune_fields(written, {}, [0, 3, 4])
    assert pruned == {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "per_layer_config": {"00": {"a": 1}, "01": {"a": 2}},
        "block_types": ["recurrent", "attention", "recurrent"],
        "scale_depth": pytest.approx(1.2 / 2**0.5),
        "ple_layer_ids": [1, 2],
    }


def test_attention_types_are_written_out(tmp_path: Path) -> None:
    """GPT-Neo says twice which layers are local, once in a short form."""
    config = AutoConfig.for_model("gpt_neo", num_layers=6, attention_types=[[["global", "local"], 3]]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    pruned = prune_config(tmp_path, [0, 1, 3])
    assert pruned["attention_layers"] == ["global", "local", "local"]
    assert pruned["attention_types"] == [[["global"], 1], [["local"], 1], [["local"], 1]]


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "jamba",
            {"attn_layer_period": 3, "attn_layer_offset": 2},
            r"by a cadence \(attn_layer_period = 3, attn_layer_offset = 2\)",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' ties each layer to its index"),
        ("llama", {"widths": [1, 2, 3, 4, 5, 6]}, r"'widths' has as many entries as the model has layers \(6\), and no rule says"),
        ("llama", {"widths": {str(n): n for n in range(6)}}, r"'widths' has as many entries as the model has layers \(6\)"),
        (
            "gemma4_unified_text",
            {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2},
            r"layer 3 supplies keys and values to layers 5 of 6, so it must stay while they do",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(model_type: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, model_type, **fields)
    with pytest.raises(ModelError, match=message):
        prune_config(tmp_path, [0, 1, 2, 5])


def test_sparse_step_becomes_a_list_of_exceptions(tmp_path: Path) -> None:
    """Qwen's cadence of experts can be written as a list, so that no removal breaks it."""
    write_config(tmp_path, "qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[5])  # experts in layers 1 and 3
    pruned = prune_config(tmp_path, [0, 1, 3, 5])
    assert (pruned["decoder_sparse_step"], pruned["mlp_only_layers"]) == (1, [0, 3])
    pruned = prune_config(tmp_path, [0, 3, 4, 5])
    assert (pruned["decoder_sparse_step"], pruned["mlp_only_layers"]) == (1, [0, 2, 3])


def test_cadence_takes_other_numbers_where_they_say_the_same(tmp_path: Path) -> None:
    write_config(tmp_path, "jamba", attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, num_experts=1)
    pruned = prune_config(tmp_path, [0, 1, 3, 4])  # attention was in 1 and 4, and is now in 1 and 3
    assert (pruned["attn_layer_period"], pruned["attn_layer_offset"]) == (2, 1)


def test_decoder_of_a_model_of_several_parts(tmp_path: Path) -> None:
    from zoo import make_config

    make_config("gemma3").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    pruned = prune_config(tmp_path, [0, 3, 4])
    assert pruned["text_config"]["num_hidden_layers"] == 3
    assert pruned["text_config"]["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert {**pruned, "text_config": None} == {**written, "text_config": None}


def test_layer_prefix() -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("mlp.experts.0.w", "mlp.experts.1.w", "norm")]
    assert find_layer_prefix([*names, "model.embed"], 3) == "model.layers"
    assert layer_of("model.layers.12.norm", "model.layers") == 12
    assert layer_of("model.layers_extra.1.norm", "model.layers") is None
    assert layer_of("model.embed", "model.layers") is None


def test_layer_prefix_must_be_one() -> None:
    names = [f"{tower}.layers.{layer}.w" for tower in ("encoder", "decoder") for layer in range(2)]
    message = r"no single list of 2 layers, .*: decoder.layers.\* \(2\), encoder.layers.\* \(2\)"
    with pytest.raises(ModelError, match=message):
        find_layer_prefix(names, 2)
    with pytest.raises(ModelError, match="numbered tensors: none"):
        find_layer_prefix(["embed"], 2)
