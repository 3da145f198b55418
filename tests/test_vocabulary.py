"""Embeddings and head are in memory where they are used, and beside no layer; names of tensors are looked through once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline.batches import make_batches
from gradmap_pipeline.checkpoint import graph as graph_module
from gradmap_pipeline.checkpoint.checkpoint import StoredTensor
from gradmap_pipeline.checkpoint.graph import BaseCheckpoint, ModelGraph, open_folder
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.memory_plan import _SLACK, plan_sweep
from gradmap_pipeline.sweep.needs import measure_needs
from gradmap_pipeline.sweep.sample_pass import SamplePass

IDS = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))


def names_in_memory(model: LayerwiseModel) -> set[str]:
    wanted = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    return {name for name in wanted if not parameters[name].is_meta}


@pytest.mark.parametrize("tied", [False, True])
def test_neither_embeddings_nor_head_are_beside_a_layer(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The losses and gradients are those of the whole model."""
    folder = make_model(tmp_path, tied=tied)
    model = LayerwiseModel(open_folder(folder), resident_bytes=0)
    assert "corrupted" not in capsys.readouterr().err  # what comes later is not missing
    assert names_in_memory(model) == set()
    size = 300 * 32 * 4
    sweep = SamplePass(model, make_batches(IDS, torch.ones_like(IDS)))
    for step in sweep.forward():
        assert names_in_memory(model) <= {"model.layers.0.mlp.up_proj.weight"}
        assert model.weights.ledger.held["embeddings and head"] == 0
        del step
    losses = torch.cat(list(sweep.losses()))
    for step in sweep.backward():
        assert names_in_memory(model) <= {"model.layers.0.mlp.up_proj.weight"}
        gradient = next(iter(step)).gradient
    assert model.weights.ledger.peaks["embeddings and head"] == size  # one of the two at a time
    whole = AutoModelForCausalLM.from_pretrained(folder)
    hidden = whole.model.embed_tokens(IDS).detach().requires_grad_()
    logits = whole(inputs_embeds=hidden, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(4, 15)
    torch.testing.assert_close(losses, expected)
    stream = (
        whole.model(inputs_embeds=hidden, output_hidden_states=True, use_cache=False).hidden_states[1].detach().requires_grad_()
    )
    handle = whole.model.layers[0].register_forward_hook(lambda *_: stream)
    torch.nn.functional.cross_entropy(
        whole(inputs_embeds=hidden, use_cache=False).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
    ).backward()
    handle.remove()
    assert stream.grad is not None
    torch.testing.assert_close(gradient, stream.grad, rtol=1e-4, atol=1e-7)


def test_where_layers_stay_embeddings_and_head_do_too(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama))
    list(SamplePass(model, make_batches(IDS, torch.ones_like(IDS))).losses())
    assert len(names_in_memory(model)) == 3
    assert model.weights.ledger.held["embeddings and head"] == 2 * 300 * 32 * 4


def test_what_is_tried_needs_no_embeddings(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama), resident_bytes=0)
    hidden, _ = model.record(make_batches(IDS, torch.ones_like(IDS))[0], is_made_up=True)
    assert hidden.shape == (4, 16, 32)
    assert hidden.std() == pytest.approx(1, rel=0.1)
    measure_needs(model, 4, 16)
    assert "embeddings and head" not in model.weights.ledger.peaks


def test_a_plan_counts_the_largest_of_embeddings_layer_and_head(llama: Path) -> None:
    needs = measure_needs(LayerwiseModel(open_folder(llama), resident_bytes=0), 4, 16)
    vocabulary = 300 * 32 * 4
    assert (needs.embedding_bytes, needs.head_bytes, needs.vocabulary_bytes) == (vocabulary, vocabulary, 2 * vocabulary)
    tight = plan_sweep(needs, _SLACK + max(needs.head_bytes + needs.count_logit_bytes(1), 3 * needs.layer_bytes) + (1 << 17))
    assert not tight.is_resident
    assert {"embeddings and head", "layer weights"} - set(tight.lines)  # not both at the peak
    roomy = plan_sweep(needs, 1 << 30)
    assert roomy.lines["embeddings and head"] == 2 * vocabulary
    assert roomy.lines["layer weights"] == needs.all_layer_bytes


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_embeddings_that_are_missing_or_of_another_shape(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    value = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks the weights of '{name}'"):
        LayerwiseModel(open_folder(folder))
    save_file({**tensors, name: value[:, :16].contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"'{name}' has shape \(300, 16\) in the checkpoint, but its config requires \(300, 32\)"):
        LayerwiseModel(open_folder(folder))


def test_names_are_looked_through_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with as many names as DeepSeek-V3: no layer costs a look at those of the others."""
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(60) for expert in range(768)]
    base = BaseCheckpoint(folder=llama, name="many", sha256="", layers=60)
    stored = {name: StoredTensor(llama / "model.safetensors", name, "BF16", (1,), 0) for name in [*names, "lm_head.weight"]}
    base.__dict__["tensors"], base.__dict__["layer_prefix"] = stored, "model.layers"
    graph = ModelGraph(base=base, layers=tuple(range(60)))
    looked: list[str] = []
    layer_of = graph_module.layer_of

    def count(name: str, prefix: str) -> int | None:
        looked.append(name)
        return layer_of(name, prefix)

    monkeypatch.setattr(graph_module, "layer_of", count)
    for layer in graph.layers:
        assert len(graph.layer_tensors(layer)) == 768
    assert list(graph.other_tensors()) == ["lm_head.weight"]
    assert len(looked) == len(names) + 1
