"""What `checkpoint/adapter.py` takes from transformers by convention: each fact, and what breaks without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gradmap_pipeline.checkpoint import adapter
from gradmap_pipeline.checkpoint.adapter import LateTensor, load_tensors
from gradmap_pipeline.errors import ModelError

EXPERTS = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}


def make(architecture: str = "llama", device: str = "cpu", **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **{**(EXPERTS if architecture == "mixtral" else SMALL), **changes})
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def save(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors by their names on disk."""
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def late(tensors: dict[str, torch.Tensor]) -> dict[str, LateTensor]:
    return {name: LateTensor(lambda tensor=tensor: tensor) for name, tensor in tensors.items()}  # type: ignore[misc]


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "phi3"])
def test_every_parameter_finds_its_tensor(architecture: str, tmp_path: Path) -> None:
    """Otherwise models are swept with other weights than their checkpoint's."""
    model, empty = make(architecture), make(architecture, "meta")
    loading = load_tensors(empty, late(save(model, tmp_path)), torch.float32, "cpu")
    assert not loading.missing
    assert not loading.find_left_over(empty)
    expected = dict(model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in empty.named_parameters())


def test_experts_are_read_one_by_one(tmp_path: Path) -> None:
    """Otherwise loading a layer of experts takes more than twice its size."""
    model, empty = make("mixtral"), make("mixtral", "meta")
    alive, most = 0, 0

    def read(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, most
        copy = tensor.clone()
        alive += copy.nbytes
        most = max(most, alive)

        def gone(size: int = copy.nbytes) -> None:
            nonlocal alive
            alive -= size

        import weakref

        weakref.finalize(copy, gone)
        return copy

    tensors = save(model, tmp_path)
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    assert len(experts) == 4 * 4 * 3
    load_tensors(empty, {name: LateTensor(lambda t=t: read(t)) for name, t in experts.items()}, torch.float32, "cpu")  # type: ignore[misc]
    assert most <= 3 * max(tensor.nbytes for tensor in experts.values())
    assert adapter.count_conversion_copies(empty) == 0


def test_conversions_that_are_not_known_count_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a plan promises less memory than loading takes."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    step = WeightConverter("a", "b", operations=[Transpose()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [step])
    assert adapter.count_conversion_copies(make()) == 2


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    """Otherwise a layer without a weight is run with what its memory held."""
    empty = make(device="meta")
    tensors = save(make(), tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    assert load_tensors(empty, late(tensors), torch.float32, "cpu").missing == {"model.layers.1.mlp.up_proj.weight"}


def test_what_is_left_over_is_told(tmp_path: Path) -> None:
    """Otherwise a checkpoint of another model is taken for this one."""
    empty = make(device="meta")
    tensors = {**save(make(), tmp_path), "model.layers.1.other.weight": torch.zeros(2)}
    assert load_tensors(empty, late(tensors), torch.float32, "cpu").find_left_over(empty) == {"model.layers.1.other.weight"}


def test_another_shape_is_refused(tmp_path: Path) -> None:
    """Otherwise a weight is left on the meta device, with an error far from its cause."""
    tensors = {**save(make(), tmp_path), "model.norm.weight": torch.zeros(3)}
    with pytest.raises(ModelError, match=r"'model.norm.weight' has shape \(3,\) in .*, but its config requires \(32,\)"):
        load_tensors(make(device="meta"), late(tensors), torch.float32, "cpu")


def test_experts_of_two_shapes_are_refused(tmp_path: Path) -> None:
    """Otherwise one expert's rows are taken for another's."""
    tensors = save(make("mixtral"), tmp_path)
    name = next(name for name in tensors if "experts.2.w1" in name)
    tensors[name] = torch.zeros(63, 32)
    with pytest.raises(ModelError, match=r"do not fit together: expert 2 has shape \(63, 32\), expert 0 \(64, 32\)"):
        load_tensors(make("mixtral", "meta"), late(tensors), torch.float32, "cpu")


def test_tensors_get_the_type_to_compute_in(tmp_path: Path) -> None:
    """Otherwise a sweep in bfloat16 holds float32 weights."""
    empty = make(device="meta").to(torch.bfloat16)
    load_tensors(empty, late(save(make(), tmp_path)), torch.bfloat16, "cpu")
    assert {parameter.dtype for parameter in empty.parameters()} == {torch.bfloat16}


def test_some_architectures_have_types_of_their_own() -> None:
    """Otherwise tensors that must stay in float32 are rounded when they are read."""
    assert not adapter.has_types_of_its_own(make(), torch.bfloat16)
    assert not adapter.has_types_of_its_own(make(), torch.float32)


def test_tied_weights_are_tied_after_loading(tmp_path: Path) -> None:
    """Otherwise the head of a tied model stays empty."""
    tensors = save(make(tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in tensors
    empty = make(device="meta", tie_word_embeddings=True)
    missing = load_tensors(empty, late(tensors), torch.float32, "cpu").missing
    adapter.tie_weights(empty, missing)
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    assert adapter.is_tied(empty, "lm_head.weight")
    assert not adapter.is_tied(empty, "model.norm.weight")


def test_buffers_are_computed_and_parameters_are_not(tmp_path: Path) -> None:
    """Otherwise position embeddings are wrong, or weights random."""
    empty = make(device="meta")
    rotary = empty.get_submodule("model.rotary_emb")
    rotary._buffers["inv_freq"] = torch.zeros(4)
    adapter.compute_buffers(empty)
    assert torch.allclose(rotary.inv_freq, 1 / 10000 ** (torch.arange(0, 8, 2) / 8))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_names_on_disk_may_lack_the_prefix() -> None:
    """Otherwise tensors of a checkpoint of the decoder alone are not recognised."""
    assert adapter.prefix_on_disk(make()) == "model."


def test_layers_are_called_with_hidden_states_first() -> None:
    """Otherwise a layer's input cannot be recorded, nor its output replaced."""
    model, calls = make(), []
    layer = model.get_submodule("model.layers.1")
    before = layer.forward

    def listen(*positional: Any, **named: Any) -> Any:
        calls.append(named["hidden_states"] if "hidden_states" in named else positional[0])
        return before(*positional, **named)

    layer.forward = listen  # type: ignore[method-assign]
    adapter.call_without_cache(model, torch.arange(6)[None], None)
    assert calls[0].shape == (1, 6, 32)


def test_a_call_without_cache_keeps_none() -> None:
    """Otherwise a sweep's memory grows with each batch."""
    output = adapter.call_without_cache(make(), torch.arange(6)[None], torch.ones(1, 6, dtype=torch.long))
    assert output.past_key_values is None
    assert output.logits.shape == (1, 6, 300)


def test_logits_of_some_positions_are_those_of_all() -> None:
    """Otherwise the head of a large vocabulary takes all positions at once."""
    model, ids = make(), torch.arange(6)[None]
    assert adapter.can_keep_positions(model)
    some = adapter.call_without_cache(model, ids, None, torch.tensor([2, 4])).logits
    assert torch.allclose(some, adapter.call_without_cache(model, ids, None).logits[:, [2, 4]], atol=1e-6)


def test_no_mask_means_that_all_tokens_count() -> None:
    """Otherwise a batch without padding is another text."""
    model, ids = make(), torch.arange(6)[None]
    logits = [adapter.call_without_cache(model, ids, mask).logits for mask in (None, torch.ones_like(ids))]
    assert torch.allclose(*logits, atol=1e-6)


def test_arguments_are_known_by_name() -> None:
    """Otherwise a graph lacks the positions of its tokens."""
    assert adapter.takes(make(), "position_ids")
    assert not adapter.takes(make("gpt2", n_layer=2, n_embd=32, n_head=4), "rows")


def test_a_cache_says_what_its_layers_keep() -> None:
    """Otherwise an ONNX graph is exported that cannot be continued."""
    assert adapter.name_cache_layers(AutoConfig.for_model("llama", **SMALL)) == []
    mixed = AutoConfig.for_model("lfm2", **{**SMALL, "layer_types": ["conv", "full_attention"] * 2})
    assert len(adapter.name_cache_layers(mixed)) == 2


def test_a_cache_that_cannot_count_says_so() -> None:
    """Otherwise a pruned model is exported that fails at its first token."""
    assert adapter.refuse_cache(AutoConfig.for_model("llama", **SMALL)) is None
    no_attention = AutoConfig.for_model("lfm2", **{**SMALL, "layer_types": ["conv"] * 4})
    assert "can only be called on Attention layers" in str(adapter.refuse_cache(no_attention))


def test_some_linear_maps_are_transposed() -> None:
    """Otherwise a correction is written to the wrong side of a matrix."""
    attention = make("gpt2", n_layer=2, n_embd=32, n_head=4).get_submodule("transformer.h.0.attn.c_proj")
    assert adapter.is_transposed(attention)
    assert isinstance(attention, adapter.linear_classes())
    assert not adapter.is_transposed(torch.nn.Linear(2, 3))


def test_keys_and_values_go_into_a_cache_and_come_out() -> None:
    """Otherwise the parity of an exported graph is that of another continuation."""
    model, ids = make(), torch.arange(6)[None]
    mask = torch.ones_like(ids)
    cache = model(input_ids=ids, attention_mask=mask, past_key_values=adapter.make_cache(), use_cache=True).past_key_values
    pairs = list(adapter.read_cache(cache))
    assert [tuple(part.shape) for part in pairs[0]] == [(1, 2, 6, 8)] * 2
    again = list(adapter.read_cache(adapter.make_cache(pairs)))
    assert all(
        torch.equal(one, other) for pair, same in zip(pairs, again, strict=True) for one, other in zip(pair, same, strict=True)
    )


def test_tokens_that_follow_a_cache_are_at_its_end() -> None:
    """Otherwise text that a model writes is that of another model."""
    model, ids = make(sliding_window=None), torch.arange(12)[None]
    whole = model(input_ids=ids, use_cache=False).logits
    first, cache = adapter.call_with_cache(model, ids[:, :7])
    parts = [first]
    for place in range(7, 12):
        logits, cache = adapter.call_with_cache(model, ids[:, place : place + 1], cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_model_without_keys_and_values_says_so() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ModelError, match="MambaForCausalLM keeps no keys and values, so it cannot generate text one token at a time"
    ):
        adapter.call_with_cache(model, torch.arange(4)[None])
