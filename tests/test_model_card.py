"""The README.md of each kind of export: what the hub reads, what was done, and how to run this very folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tiny import make_model
from walk import make_model as make_any_model

from gradmap_pipeline import Metric, ModelGraph
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.export.base_card import carried_metadata
from gradmap_pipeline.export.card_usage import Format
from gradmap_pipeline.export.folders import write_card
from gradmap_pipeline.export.model_card import Holding, make_model_card

PLAIN = Holding("safetensors", {"model.safetensors": 1234})


@pytest.fixture
def pruned(tmp_path: Path) -> ModelGraph:
    return open_folder(make_model(tmp_path / "base")).without_layers([1, 2])


def from_hub(graph: ModelGraph) -> ModelGraph:
    return graph.model_copy(update={"base": graph.base.model_copy(update={"from_hub": True, "name": "owner/name"})})


def metadata_of(card: str) -> dict[str, object]:
    metadata: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return metadata


def test_card_says_what_was_done(pruned: ModelGraph) -> None:
    perplexity = Metric(name="perplexity", value=40.0, better="lower", on="text", setting="1 x 2 tokens", model=pruned.digest)
    accuracy = Metric(name="acc|em", value=0.25, better="higher", stderr=0.0123, unit="%", model=pruned.digest)
    card = make_model_card(pruned, [perplexity, accuracy], PLAIN)
    assert metadata_of(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gradmap", "depth-pruning"],
    }
    assert f"# {pruned.base.folder.name}, 2 of 4 layers\n" in card
    assert "Layers removed, counted from 0: 1, 2." in card
    assert f"{pruned.count_parameters():,} parameters, 1,234 bytes in `model.safetensors`." in card
    assert "| metric | on | this model | better |\n|---|---|---:|---|\n" in card
    assert "| perplexity | text, 1 x 2 tokens | 40.000 | lower |" in card
    assert "| acc\\|em |  | 0.2500 ± 0.012 % | higher |" in card
    local = perplexity.model_copy(update={"on": "/home/me/texts/prose.txt"})
    assert "| perplexity | prose.txt, 1 x 2 tokens | 40.000 |" in make_model_card(pruned, [local], PLAIN)
    hub = perplexity.model_copy(update={"on": "owner/name train"})
    assert "| perplexity | owner/name train, 1 x 2 tokens | 40.000 |" in make_model_card(pruned, [hub], PLAIN)
    assert "quantis" not in card
    assert str(pruned.base.folder.parent) not in card


def test_the_unpruned_model_stands_beside_it(pruned: ModelGraph) -> None:
    """Where it was measured alike: on the same text, and in the same way. What it alone has is left out."""
    own = Metric(name="perplexity", value=40.0, better="lower", on="text", setting="1 x 2 tokens", model=pruned.digest)
    answers = Metric(name="repetition", value=0.5, better="lower", model=pruned.digest)
    dense = own.model_copy(update={"value": 20.0, "model": pruned.dense.digest})
    others = [
        dense.model_copy(update={"value": 21.0, "setting": "3 x 2 tokens"}),
        dense.model_copy(update={"value": 22.0, "on": "prose"}),
        dense.model_copy(update={"value": 23.0, "model": "another"}),
    ]
    card = make_model_card(pruned, [*others, dense, own, answers], PLAIN)
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert table == [
        "| metric | on | unpruned | this model | better |",
        "|---|---|---:|---:|---|",
        "| perplexity | text, 1 x 2 tokens | 20.000 | 40.000 | lower |",
        "| repetition |  |  | 0.5000 | lower |",
    ]


def test_changed_weights_take_a_line_for_each_name(pruned: ModelGraph) -> None:
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (3, 5, 6, 7, 9, 10)]
    names += ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"]
    changed = pruned.model_copy(update={"patches": dict.fromkeys(names)})
    lines = [line for line in make_model_card(changed, (), PLAIN).splitlines() if line.startswith("- ")]
    assert lines == [
        "- `mlp.down_proj.weight` of layers 3, 5 to 7, 9, 10",
        "- `self_attn.o_proj.weight` of layers 0",
        "- `model.norm.weight`",
    ]


def test_a_chat_model_is_shown_to_answer(pruned: ModelGraph, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    for settings, shown in (({}, False), ({"chat_template": "{{ messages }}"}, True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        write_card(tmp_path, pruned, (), "safetensors")
        card = (tmp_path / "README.md").read_text()
        assert ("apply_chat_template" in card) == shown
        assert "model.generate(" in card
        compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "card", "exec")


def test_relation_to_a_base_on_the_hub(pruned: ModelGraph) -> None:
    card = make_model_card(from_hub(pruned), (), PLAIN)
    assert (metadata_of(card)["base_model"], metadata_of(card)["base_model_relation"]) == ("owner/name", "finetune")
    assert "| metric |" not in card
    small = Holding("onnx", {"model.onnx": 10, "model.onnx_data": 90}, "int4", ("the head stays in float32",))
    quantised = make_model_card(from_hub(pruned), (), small)
    assert metadata_of(quantised)["base_model_relation"] == "quantized"
    assert "# owner/name, 2 of 4 layers, int4\n" in quantised
    assert "100 bytes in `model.onnx`, `model.onnx_data`." in quantised
    assert "Weights quantised: int4.\n- the head stays in float32\n" in quantised


@pytest.mark.parametrize("form", ["safetensors", "torchao", "compressed-tensors", "onnx", "gguf"])
def test_programs_that_compute_another_model_are_named(form: Format, tmp_path: Path) -> None:
    kinds = ["full_attention" if layer in (5, 11) else "sliding_attention" for layer in range(12)]
    base = make_any_model(tmp_path / "base", "gemma3_text", num_hidden_layers=12, layer_types=kinds)
    graph = open_folder(base)
    for name, removed in (("same", [6, 7, 8, 9, 10, 11]), ("other", [1])):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, graph.without_layers(removed), (), form)
    told = "What programs compute otherwise:"
    assert told not in (tmp_path / "same" / "README.md").read_text()
    card = (tmp_path / "other" / "README.md").read_text()
    shown = f"{told}\n\n- llama.cpp would take layer 5 for those with full attention, where the model has layers 4, 10, unless"
    assert (shown in card) == (form not in ("onnx", "gguf"))
    assert ("- mlx-lm would take layer 5 for" in card) == (form not in ("onnx", "gguf"))


def test_the_card_of_a_gguf_file_names_what_llama_cpp_leaves_out(tmp_path: Path) -> None:
    base = make_any_model(tmp_path / "base", "mistral", sliding_window=64)
    write_card(tmp_path, open_folder(base), (), "gguf")
    told = "- llama.cpp has no windows for mistral: beyond 64 tokens it computes another model\n"
    assert told in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("form", "file", "library", "shown", "not_shown"),
    [
        ("safetensors", "model.safetensors", "transformers", ["AutoModelForCausalLM"], ["torchao", "optimum"]),
        ("torchao", "model.safetensors", "transformers", ["pip install transformers torchao", "AutoModelForCausalLM"], ["vllm"]),
        ("compressed-tensors", "model.safetensors", "transformers", ["compressed-tensors`", "vllm serve"], ["torchao"]),
        ("onnx", "model.onnx_data", "onnx", ["ORTModelForCausalLM", "genai.Model("], ["AutoModelForCausalLM", "@huggingface"]),
        ("onnx", "onnx/model_q4.onnx_data", "transformers.js", ["ORTModelForCausalLM", "@huggingface/transformers"], ["torchao"]),
        ("gguf", "model-q8_0.gguf", "gguf", ["llama-cli -m model-q8_0.gguf"], ["AutoModel", "from_pretrained"]),
    ],
)
def test_how_to_run_each_format(
    form: Format, file: str, library: str, shown: list[str], not_shown: list[str], pruned: ModelGraph, tmp_path: Path
) -> None:
    (tmp_path / "out" / file).parent.mkdir(parents=True)
    (tmp_path / "out" / file).write_bytes(bytes(77))
    write_card(tmp_path / "out", pruned, (), form)
    card = (tmp_path / "out" / "README.md").read_text()
    assert metadata_of(card)["library_name"] == library
    assert f"parameters, 77 bytes in `{file}`." in card
    assert all(text in card for text in shown), card
    assert not any(text in card for text in not_shown), card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "---\nlicense: apache-2.0\nlanguage:\n- en\n- no\ntags: [x]\n---\n# Title",
            ["license: apache-2.0", 'language: [en, "no"]'],
        ),
        (
            "---\r\nlicense: other\r\nlicense_name: my terms\r\nlicense_link: LICENSE\r\nlanguage: en\r\n---\r\n",
            ["license: other", 'license_name: "my terms"', "license_link: LICENSE", "language: en"],
        ),
        ('---\nlicense: "a\\nbase_model: evil/model"\n---\n', ['license: "a\\nbase_model: evil/model"']),
        ("---\nlicense: [\n---\n", []),
        ("---\n- license\n---\n", []),
        ("---\nlicense: 3\nlanguage: [1]\n---\n", []),
        ("# no block\nlicense: mit\n", []),
        ("---\nlicense: mit\n", []),
    ],
)
def test_licence_and_language_of_the_base(text: str, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert carried_metadata(tmp_path) == lines
    yaml.safe_load("\n".join(lines))


def test_a_card_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret.md")
    assert carried_metadata(tmp_path / "model") == []


def test_the_base_s_licence_is_in_the_card(pruned: ModelGraph) -> None:
    (pruned.base.folder / "README.md").write_text("---\nlicense: gemma\nlanguage: en\n---\n")
    metadata = metadata_of(make_model_card(pruned, (), PLAIN))
    assert (metadata["license"], metadata["language"]) == ("gemma", "en")
