"""Kept layers are the layers that the pruned config makes, or the difference is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from walk import make_model

from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.layer_check import check_same_layers
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.stages.structure_probe import StructureProbe

MEMORY = 1 << 30


@pytest.mark.parametrize(
    ("architecture", "kept", "message"),
    [
        ("minicpm3", [0, 2, 5], None),  # its scale by depth is kept
        ("minimax", [0, 1, 5], None),  # its layers know the depth, and store what they make of it
        ("zamba2", [0, 2, 3, 5], None),  # its layers list layers
        (
            "diffllama",
            [0, 2, 3],
            "layer 2 would be another layer at place 1 of the pruned model: 'lambda_init' of 'self_attn' changes",
        ),
        (
            "modernbert-decoder",
            [1, 2, 3],
            "layer 1 would be another .*: 'attn_norm' is a LayerNorm in one and a Identity in the other",
        ),
        ("gpt_neox_japanese", [0, 1, 2], "layer 2 would be .*: 'dense_bias' of 'attention' has shape None in one and"),
        ("rwkv", [1, 2], "layer 1 would be another layer at place 0 of the pruned model: 'pre_ln' is in only one of them"),
        (
            "gemma3n_text",
            [0, 2, 3, 5],
            r"'model.embed_tokens_per_layer.weight' has shape \(320, 48\) now, but \(320, 32\) in a model of 4",
        ),
        (
            "bamba",
            [0, 1, 3],
            "transformers has no cache for the layers that would be left .*; remove fewer, or list under 'layers'",
        ),
    ],
)
def test_differences_are_named(architecture: str, kept: list[int], message: str | None, tmp_path: Path) -> None:
    base = open_folder(make_model(tmp_path, architecture)).base
    if message is None:
        check_same_layers(base, kept)
        return
    with pytest.raises(ModelError, match=message):
        check_same_layers(base, kept)


def test_a_rule_that_is_missing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rule for max_window_layers, Qwen2's windows would move; without that for layer_types too."""
    from gradmap_pipeline.checkpoint import depth

    base = open_folder(make_model(tmp_path, "deepseek_v3")).base
    check_same_layers(base, [1, 2, 3])
    monkeypatch.setattr(depth, "FROM_BOTTOM", set())
    with pytest.raises(ModelError, match="layer 2 would be another layer at place 1 of the pruned model: "):
        check_same_layers(base, [1, 2, 3])


@pytest.mark.parametrize(
    ("architecture", "question", "message"),
    [
        ("llama", "check_layerwise", None),
        ("deepseek_v4", "check_layerwise", r"its hidden states have shape \(2, 8, 4, 32\), not \(batch, tokens, hidden\)"),
        ("zaya", "check_layerwise", "each layer gets more from the one below than hidden states"),
        ("zamba", "check_layerwise", "'model.layers.5.shared_transf.self_attn.q_proj.weight' is shared with another layer"),
        ("reformer", "check_layerwise", "cannot be run layer by layer: TypeError"),
        ("gemma4_unified_text", "check_layerwise", None),
        ("gemma4_unified_text", "check_gradients", "layer 2 supplies keys and values to 4, so hidden states do not carry"),
        ("gpt_neo", "check_removable", None),
        ("beam", "check_removable", "'attn_residual_add_idx' of the layer changes"),
    ],
)
def test_survey_answers_before_a_run(architecture: str, question: str, message: str | None, tmp_path: Path) -> None:
    probe = StructureProbe(open_folder(make_model(tmp_path, architecture)), MEMORY)
    if message is None:
        getattr(probe, question)()
        return
    with pytest.raises(ModelError, match=message):
        getattr(probe, question)()


@pytest.mark.parametrize(
    ("architecture", "sites"),
    [
        ("llama", dict.fromkeys(range(6), ("self_attn.o_proj", "mlp.down_proj"))),
        (
            "deepseek_v3",
            dict.fromkeys((0, 1), ("self_attn.o_proj", "mlp.down_proj"))
            | dict.fromkeys((2, 3, 4, 5), ("self_attn.o_proj", "mlp.shared_experts.down_proj")),
        ),
        ("gptj", dict.fromkeys(range(6), ("mlp.fc_out",))),
        ("jetmoe", dict.fromkeys(range(6), ())),
    ],
)
def test_survey_finds_sites_of_each_kind_of_layer(architecture: str, sites: dict[int, Any], tmp_path: Path) -> None:
    graph = open_folder(make_model(tmp_path, architecture))
    probed = StructureProbe(graph, MEMORY).find_sites()
    assert {layer: tuple(site.name for site in there) for layer, there in probed.items()} == sites
    assert StructureProbe(graph, 1000).find_sites() == {}  # no room to try


def test_sweeps_notice_shared_states(tmp_path: Path) -> None:
    """Keys and values that layers leave for others are no part of the hidden states."""
    import torch

    from gradmap_pipeline.batches import make_batches
    from gradmap_pipeline.sweep.layerwise import LayerwiseModel
    from gradmap_pipeline.sweep.sample_pass import SamplePass

    model = LayerwiseModel(open_folder(make_model(tmp_path, "gemma4_unified_text")))
    sweep = SamplePass(model, make_batches(torch.randint(3, 300, (2, 8)), torch.ones(2, 8)))
    sweep.run_forward()
    assert model.shares_state
    with pytest.raises(ModelError, match="layers use keys and values of other layers"):
        next(sweep.backward())
