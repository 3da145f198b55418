"""The layer-by-layer sweep computes what the model computes: the same losses, logits and gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model
from transformers import AutoModelForCausalLM

from gradmap_pipeline.batches import make_batches, next_token_losses, predicted_tokens
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.sweep import head_losses, sweep as engine, weight_sources
from gradmap_pipeline.sweep.head_losses import slice_positions
from gradmap_pipeline.sweep.kept_tensors import KeptTensors
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.sample_pass import SamplePass
from gradmap_pipeline.testing import make_context


def make_samples(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 300, (5, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(5):
            mask[row, 20 - 3 * row :] = 0
    return ids, mask


def watch(gradients: list[torch.Tensor], _module: Any, _inputs: Any, output: Any) -> None:
    """Collect the gradient at a layer's output."""
    (output[0] if isinstance(output, tuple) else output).register_hook(gradients.append)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_gradients_equal_plain_backward(tmp_path: Path, architecture: str, tied: bool, padded: bool, resident_bytes: int) -> None:
    folder = make_model(tmp_path, architecture, tied=tied)
    batches = make_batches(*make_samples(padded), batch_tokens=40)
    sweep = SamplePass(LayerwiseModel(open_folder(folder), resident_bytes=resident_bytes), batches, weight_gradients=True)
    assert len(batches) > 1
    ours: dict[str, torch.Tensor] = {}
    outputs: dict[int, list[torch.Tensor]] = {}
    for step in sweep.backward():
        outputs[step.layer] = [visit.gradient for visit in step]
        ours |= {f"{sweep.model.layers_path}.{step.layer}.{name}": value for name, value in step.weight_gradients.items()}

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = model.get_submodule(sweep.model.layers_path)
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in range(len(layers))}
    for index, layer in enumerate(layers):
        layer.register_forward_hook(partial(watch, seen[index]))
    total = sum(int(predicted_tokens(batch).sum()) for batch in batches)
    for batch in batches:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), use_cache=False).logits
        (next_token_losses(logits, batch).sum() / total).backward()
    parameters = {name: value for name, value in model.named_parameters() if name.startswith(sweep.model.layers_path)}
    assert ours.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert (ours[name] - parameter.grad).norm() <= 1e-6 * parameter.grad.norm(), name
    for index, gradients in seen.items():
        for mine, plain in zip(outputs[index], gradients, strict=True):
            assert (mine - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("weight_gradients", [False, True])
@pytest.mark.parametrize("way", ["graphs", "spilled", "sliced head"])
def test_ways_to_save_change_nothing(
    llama: Path, tmp_path: Path, way: str, weight_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three removals: gradients with kept graphs, and with boundaries in a file, are those of recomputation, bit for bit."""

    def run(**options: Any) -> tuple[list[torch.Tensor], SamplePass]:
        batches = make_batches(*make_samples(padded=True), batch_tokens=40)
        sweep = SamplePass(LayerwiseModel(open_folder(llama)), batches, weight_gradients=weight_gradients, **options)
        gradients = []
        for removed in (None, 2, 1):
            if removed is not None:
                sweep.remove(removed)
            for step in sweep.backward():
                gradients += [visit.gradient for visit in step]
                gradients += step.weight_gradients.values()
        return gradients, sweep

    plain, sweep = run()
    assert (sweep.layer_forwards, sweep.layer_backwards) == ((6 + 9, 9) if weight_gradients else (6 + 6, 6))
    if way == "graphs":
        saved, sweep = run(keep_graphs=True)
        assert (sweep.layer_forwards, sweep.layer_backwards) == (4 + 1 + 1, 9 if weight_gradients else 6)
    elif way == "spilled":
        boundaries = KeptTensors(3000, tmp_path)
        saved, sweep = run(kept=boundaries)
        assert boundaries.bytes_written > 0
        assert boundaries.bytes_read > 0
    else:
        monkeypatch.setattr(head_losses, "LOGITS_AT_ONCE", 2 * 300 * 7)
        saved, sweep = run()
    assert len(plain) == len(saved)
    for one, other in zip(plain, saved, strict=True):
        assert torch.equal(one, other) if way != "sliced head" else torch.allclose(one, other, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_head_in_slices(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path, architecture)
    batches = make_batches(*make_samples(padded=True))
    whole = next(iter(SamplePass(LayerwiseModel(open_folder(folder)), batches).losses()))
    monkeypatch.setattr(head_losses, "LOGITS_AT_ONCE", 5 * 300 * 6)
    model = LayerwiseModel(open_folder(folder))
    assert [(part.start, part.stop) for part in slice_positions(model, batches[0])] == [(0, 6), (6, 12), (12, 18), (18, 19)]
    assert torch.allclose(next(iter(SamplePass(model, batches).losses())), whole, atol=1e-6)


def test_loss_is_transformers_loss(llama: Path) -> None:
    """Against the model's own loss, which leaves out labels of -100."""
    batches = make_batches(*make_samples(padded=True))
    sweep = SamplePass(LayerwiseModel(open_folder(llama)), batches)
    (batch,), (losses,) = batches, list(sweep.losses())
    labels = batch.input_ids.masked_fill(~batch.mask, -100)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        plain = model(input_ids=batch.input_ids, attention_mask=batch.mask.long(), labels=labels).loss
    assert float(losses.sum() / predicted_tokens(batch).sum()) == pytest.approx(float(plain), rel=1e-6)


def test_padding_changes_nothing(llama: Path) -> None:
    ids, _ = make_samples(padded=False)
    short = SamplePass(LayerwiseModel(open_folder(llama)), make_batches(ids[:1, :12], torch.ones(1, 12)))
    mask = torch.zeros_like(ids[:2])
    mask[0, :12] = 1
    mask[1] = 1
    long = SamplePass(LayerwiseModel(open_folder(llama)), make_batches(ids[:2], mask))
    torch.testing.assert_close(next(iter(long.losses()))[0, :11], next(iter(short.losses()))[0], rtol=1e-5, atol=1e-6)
    assert float(next(iter(long.losses()))[0, 11:].abs().sum()) == 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_removed_layers_are_skipped(tmp_path: Path, architecture: str) -> None:
    """Removing in the sweep, or in the graph, gives the logits of the model with those layers as identities."""
    folder = make_model(tmp_path, architecture)
    batches = make_batches(*make_samples(padded=False))
    sweep = SamplePass(LayerwiseModel(open_folder(folder)), batches)
    sweep.run_forward()
    sweep.remove(2)
    sweep.remove(0)
    from_graph = SamplePass(LayerwiseModel(open_folder(folder).without_layers([0, 2])), batches)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = model.get_submodule(sweep.model.layers_path)
    for index in (0, 2):
        layers[index].forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        plain = model(input_ids=batches[0].input_ids, use_cache=False).logits
    assert torch.equal(next(iter(sweep.logits())), plain)
    assert torch.equal(next(iter(from_graph.logits())), plain)


def test_removal_keeps_what_lies_below(llama: Path) -> None:
    sweep = SamplePass(LayerwiseModel(open_folder(llama)), make_batches(*make_samples(padded=False)))
    sweep.run_forward()
    assert sweep.layer_forwards == 4
    sweep.remove(2)
    assert [step.layer for step in sweep.forward()] == [3]
    assert sweep.layer_forwards == 5


def test_lowest_layer_is_not_recomputed(llama: Path) -> None:
    sweep = SamplePass(LayerwiseModel(open_folder(llama)), make_batches(*make_samples(padded=False)))
    assert [step.layer for step in sweep.backward()] == [3, 2, 1, 0]
    assert (sweep.layer_forwards, sweep.layer_backwards) == (4 + 3, 3)


def test_one_layer_in_memory_at_a_time(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama), resident_bytes=0)
    sweep = SamplePass(model, make_batches(*make_samples(padded=False)))

    def layers_in_memory() -> list[int]:
        layers = model.module.get_submodule(model.layers_path)
        return [index for index, layer in enumerate(layers) if not next(layer.parameters()).is_meta]

    for step in sweep.forward():
        assert layers_in_memory() == [step.layer]
    for step in sweep.backward():
        assert layers_in_memory() == [step.layer]
    assert layers_in_memory() == []


def test_override_survives_dropping_the_layer(llama: Path) -> None:
    batches = make_batches(*make_samples(padded=False))
    changed = []
    for resident_bytes in (0, 1 << 30):
        model = LayerwiseModel(open_folder(llama), resident_bytes=resident_bytes)
        sweep = SamplePass(model, batches)
        before = next(iter(sweep.logits()))
        model.weights.override(1, "mlp.down_proj.weight", torch.zeros(32, 64))
        sweep.invalidate_from(1)
        changed.append(next(iter(sweep.logits())))
        assert not torch.equal(before, changed[-1])
    assert torch.equal(*changed)


def test_layers_run_without_the_rest(llama: Path) -> None:
    model = LayerwiseModel(open_folder(llama))
    sweep = SamplePass(model, make_batches(*make_samples(padded=False)))
    model.weights.forget_rest()
    sweep.run_forward()
    whole = SamplePass(LayerwiseModel(open_folder(llama)), make_batches(*make_samples(padded=False)))
    whole.run_forward()
    assert torch.equal(sweep.boundary(4, 0), whole.boundary(4, 0))
    assert {name for name, value in model.module.named_parameters() if value.is_meta} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights of 'model.layers.1.mlp.up_proj.weight'"):
        SamplePass(LayerwiseModel(open_folder(folder)), make_batches(*make_samples(padded=False))).run_forward()


def test_missing_embeddings_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks the weights of 'model.norm.weight'"):
        LayerwiseModel(open_folder(folder))


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"up_proj.weight' has shape \(3, 32\) in the checkpoint, but its config requires \(64, 32\)"
    ):
        SamplePass(LayerwiseModel(open_folder(folder)), make_batches(*make_samples(padded=False))).run_forward()


@pytest.mark.parametrize(("room", "keeps"), [(2.0, True), (0.01, False)])
def test_freed_blocks_are_kept_where_a_sweep_leaves_room_for_gaps(
    room: float, keeps: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bool] = []
    monkeypatch.setattr(engine, "keep_blocks", lambda *, keep: said.append(keep))
    graph = open_folder(llama)
    planned = engine.open_sweep(graph, make_samples(padded=False), make_context(tmp_path)).plan.peak_bytes
    monkeypatch.setattr(engine, "resident_bytes", lambda _: 0)
    engine.open_sweep(graph, make_samples(padded=False), make_context(tmp_path, memory=int(planned * (1 + room))))
    assert said == [True, keeps]


def test_a_forward_sweep_reads_every_layer_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is tried without its weights before the sweep, to learn what memory it takes."""
    graph, read = open_folder(llama), []
    load = weight_sources.load_rounded

    def watch_reads(stored: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        read.append(stored.name)
        return load(stored, *arguments, **options)

    monkeypatch.setattr(weight_sources, "load_rounded", watch_reads)
    with engine.open_sweep(graph, make_samples(padded=False), make_context(tmp_path)) as opened:
        assert not [name for name in read if ".layers." in name]
        for step in opened.forward():
            for _ in step:
                pass
    assert sorted(name for name in read if ".layers." in name) == sorted(
        tensor.name for layer in graph.layers for tensor in graph.layer_tensors(layer).values()
    )
