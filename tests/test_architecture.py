"""A pruned model's config speaks of the layers that are left, or the removal is refused with the field's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.model.architecture import find_layer_prefix, layer_of, prune_config


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


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' = 2 places layers by a cadence, which a removal breaks"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' ties each layer to its index"),
        ("llama", {"widths": [1, 2, 3, 4, 5, 6]}, r"'widths' is a list as long as the model is deep \(6\), and no rule says"),
    ],
)
def test_what_cannot_be_expressed_is_refused(model_type: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_config(tmp_path, model_type, **fields)
    with pytest.raises(ModelError, match=message):
        prune_config(tmp_path, [0, 1, 2])


def test_cadence_of_one_breaks_nothing(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_moe", decoder_sparse_step=1)
    assert prune_config(tmp_path, [0, 3])["num_hidden_layers"] == 2


def test_composite_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {"num_hidden_layers": 6}}))
    with pytest.raises(ModelError, match=r"it is a composite model \(gemma3\), and only text models can be pruned"):
        prune_config(tmp_path, [0])


def test_layer_prefix() -> None:
    names = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("mlp.experts.0.w", "mlp.experts.1.w", "norm")]
    assert find_layer_prefix([*names, "model.embed"], 3) == "model.layers"
    assert layer_of("model.layers.12.norm", "model.layers") == 12
    assert layer_of("model.layers_extra.1.norm", "model.layers") is None
    assert layer_of("model.embed", "model.layers") is None


def test_layer_prefix_must_be_one() -> None:
    names = [f"{tower}.layers.{layer}.w" for tower in ("encoder", "decoder") for layer in range(2)]
    found = r"no single list of 2 layers, .*: decoder.layers.\* \(2\), encoder.layers.\* \(2\)"
    with pytest.raises(ModelError, match=found):
        find_layer_prefix(names, 2)
    with pytest.raises(ModelError, match="numbered tensors: none"):
        find_layer_prefix(["embed"], 2)
