"""Headers, tensors and configs that do not fit each other: one line, exit code 2, before any step."""

from __future__ import annotations

import json
import math
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt import Q1, assert_refused, change_config, change_tensors, gradmap
from tiny import make_model
from zoo import make_config

from gradmap_pipeline.checkpoint.architecture import prune_config
from gradmap_pipeline.checkpoint.checkpoint import read_header
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.checkpoint.infinities import to_json
from gradmap_pipeline.checkpoint.pretrained import read_config
from gradmap_pipeline.checkpoint.skeleton import build_skeleton
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.stages.structure_probe import StructureProbe


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the current folder holds it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(llama, tmp_path / "model"))


# Headers


def write_header(file: Path, header: Any, data: bytes = bytes(16), length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return file


def entry(start: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "header",
    [
        pytest.param({"a": entry(0, 8), "b": entry(4, 12)}, id="overlap"),
        pytest.param({"a": entry(0, 8), "b": entry(-8, 0)}, id="negative"),
        pytest.param({"a": entry(0, 8), "b": entry(8.0, 16.0)}, id="not integers"),
        pytest.param({"a": entry(0, 4, (1,)), "b": entry(8, 16)}, id="gap"),
        pytest.param({"a": entry(0, 8)}, id="too short"),
        pytest.param({"a": entry(0, 16), "b": entry(16, 24)}, id="too long"),
        pytest.param({"a": entry(0, 16, (3,))}, id="shape of another size"),
        pytest.param({"a": entry(0, 16, (-4,))}, id="negative shape"),
        pytest.param({"a": entry(0, 16, (4,), "F33")}, id="unknown type"),
        pytest.param({"a": {"dtype": "F32", "shape": [4]}}, id="no offsets"),
        pytest.param({"__metadata__": {"a": 3}, "a": entry(0, 16, (4,))}, id="metadata of a number"),
        pytest.param({"__metadata__": [], "a": entry(0, 16, (4,))}, id="metadata of another kind"),
        pytest.param({"a": entry(0, 2**70, (4,))}, id="offset over 64 bits"),
        pytest.param([], id="list"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b"[" * 10_000, id="nested"),
        pytest.param({"a": 3}, id="entry of another kind"),
    ],
)
def test_headers_are_refused_as_the_library_refuses_them(header: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a complete safetensors file: .*; download it again"):
        read_header(write_header(tmp_path / "model.safetensors", header))


def test_a_header_over_the_limit_of_the_library_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)
    with pytest.raises(ModelError, match="header too large"):
        read_header(file)


def test_a_name_twice_in_a_header_is_refused(model: Path) -> None:
    one = json.dumps(entry(0, 16, (4,)))
    write_header(model / "model.safetensors", b'{"a":' + one.encode() + b',"a":' + one.encode() + b"}")
    assert_refused("is not a complete safetensors file: its header names 'a' twice", "check", "run")


# Tensors that are not those of the config


@pytest.mark.parametrize(
    ("layers", "message"), [(3, "has layer 3 (model.layers.3), but its config says 3 layers"), (5, "list of 5 layers")]
)
def test_depth_of_config_and_checkpoint_must_agree(layers: int, message: str, model: Path) -> None:
    change_config(model, num_hidden_layers=layers)
    assert_refused(message, "run", "plan")


def test_layers_that_a_config_counts_beyond_the_last_are_left_out(tmp_path: Path) -> None:
    """Layers for predicting further tokens lie after the last one, and no causal LM uses them."""
    model = make_model(tmp_path / "model", num_nextn_predict_layers=1)
    tensors = load_file(model / "model.safetensors")
    change_tensors(model, **{n.replace("layers.3.", "layers.4."): t.clone() for n, t in tensors.items() if ".layers.3." in n})
    assert not any(".layers.4." in name for name in open_folder(model).without_layers([0]).export_tensors())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({Q1: torch.zeros(8, 32)}, f"'{Q1}' has shape (8, 32) in the checkpoint, but its config requires (32, 32)"),
        ({Q1: None}, f"lacks the weights of '{Q1}'"),
        (
            {Q1: torch.zeros(32, 32, dtype=torch.int8)},
            f"'{Q1}' holds integers (I8) where the model has weights; prune a checkpoint",
        ),
        ({Q1: torch.zeros(32, 32).to(torch.float8_e4m3fn)}, f"'{Q1}' of type F8_E4M3; prune a checkpoint that is not quantised"),
        (
            {"model.embed_tokens.weight": torch.zeros(300, 32, dtype=torch.int32)},
            "'model.embed_tokens.weight' holds integers (I32)",
        ),
        ({"lm_head.weight": torch.zeros(301, 32)}, "'lm_head.weight' has shape (301, 32) in the checkpoint"),
        ({"model.norm.weight": None}, "lacks the weights of 'model.norm.weight'"),
        ({"model.layers.1.extra.weight": torch.zeros(4)}, "the checkpoint has 'model.layers.1.extra.weight', for which a Llama"),
    ],
)
def test_tensors_that_the_config_does_not_make_are_named(changes: dict[str, Any], message: str, model: Path) -> None:
    change_tensors(model, **changes)
    assert_refused(message, "run", "plan")


def test_floats_of_other_types_than_the_config_says_are_fine(model: Path) -> None:
    change_tensors(model, **{Q1: load_file(model / "model.safetensors")[Q1].bfloat16()})
    change_config(model, dtype="float16")
    StructureProbe(open_folder(model), 1 << 30).check_loadable()
    assert gradmap("run").exit_code == 0


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "says 1,000,000,000 layers, but the checkpoint has 39 tensors"),
        ({"num_hidden_layers": -4}, "has '-4' as 'num_hidden_layers'; accepted: a whole number from 1"),
        ({"num_hidden_layers": 4.0}, "has '4.0' as 'num_hidden_layers'; accepted: a whole number from 1"),
        ({"num_hidden_layers": True}, "has 'True' as 'num_hidden_layers'; accepted: a whole number from 1"),
        ({"num_hidden_layers": "4"}, "has '4' as 'num_hidden_layers'; accepted: a whole number from 1"),
        ({"max_position_embeddings": -1}, "has '-1' as 'max_position_embeddings'; accepted: a whole number from 1"),
        ({"text_config": 7}, "must hold an object as 'text_config', found int"),
        ({"vocab_size": 10**12}, "has 1,000,000,000,000 as 'vocab_size', but no size in the checkpoint is over 300"),
        ({"num_labels": 10**9}, "has 1,000,000,000 as 'num_labels', but no size in the checkpoint is over 300"),
        ({"vision_config": {"depth": 10**9}}, "has 1,000,000,000 as 'vision_config.depth'"),
        ({"rope_theta": 10**30}, "which is too large for any computer"),
        ({"rms_norm_eps": float("nan")}, "has NaN as 'rms_norm_eps'"),
    ],
)
def test_numbers_of_a_config_are_compared_with_the_tensors_first(changes: dict[str, Any], message: str, model: Path) -> None:
    change_config(model, **changes)
    assert_refused(message, "check", "run")


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "1e400", '{"__float__": "NaN"}', "[1.0, Infinity]"])
def test_an_infinite_number_in_a_config_is_refused(number: str, model: Path) -> None:
    change_config(model, rms_norm_eps="HERE")
    file = model / "config.json"
    file.write_text(file.read_text().replace('"HERE"', number))
    shown = "NaN" if "NaN" in number else "-inf" if number[0] == "-" else "inf"
    assert_refused(f"has {shown} as 'rms_norm_eps'; accepted: a finite number", "check", "run")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_an_infinite_number_beside_the_config_is_refused(name: str, model: Path) -> None:
    file = model / name
    file.write_text('{"auto_map": {"AutoTokenizer": [null, null]}, "model_max_length": 1e999}')
    assert_refused(f"{name}' has inf as 'model_max_length'; JSON has only finite numbers", "check", "run")


@pytest.mark.parametrize(
    ("limit", "exported"),
    [
        ("[0.0, Infinity]", None),
        ('[0.0, {"__float__": "Infinity"}]', None),
        ("[0.001, Infinity]", [0.001, {"__float__": "Infinity"}]),
    ],
)
def test_an_infinity_that_an_architecture_means_is_exported_as_json(limit: str, exported: Any, tmp_path: Path) -> None:
    """Mamba kinds have no upper limit of the time step. Left out, it is infinity by default, in transformers 4 too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(make_config("mamba2")).save_pretrained(folder)
    change_config(folder, time_step_limit="HERE")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"HERE"', limit))
    graph = open_folder(folder)
    text = to_json(prune_config(folder, [0, 2]), folder)
    assert json.loads(text, parse_constant=pytest.fail).get("time_step_limit") == exported
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(text)
    assert list(AutoConfig.from_pretrained(tmp_path / "out").time_step_limit) == [0.001 if exported else 0.0, math.inf]
    assert len(graph.layers) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 200_000},
        {"head_dim": 1_000_000},
        {"hidden_size": "32"},
        {"hidden_size": [32]},
        {"hidden_act": "nothing"},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 0},
        {"rope_parameters": {"rope_type": "nothing", "rope_theta": 1.0}},
        {"rope_parameters": 3},
        {"model_type": ["llama"]},
        {"model_type": None},
        {"tie_word_embeddings": "yes"},
        {"configuration_files": ["config.5.0.json"]},
    ],
)
def test_odd_configs_are_refused_before_any_step(changes: dict[str, Any], model: Path) -> None:
    change_config(model, **changes)
    assert_refused("", "run")


def test_a_text_part_that_is_null_is_none(model: Path) -> None:
    change_config(model, text_config=None)
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.full
def test_a_huge_config_takes_no_memory(model: Path) -> None:
    """In a process that may have 6 GiB of addresses, of which torch alone takes four."""
    code = (
        "import sys, json, resource; from pathlib import Path\n"
        "from gradmap_pipeline.cli import app; from gradmap_pipeline.checkpoint.graph import open_folder\n"
        "from gradmap_pipeline.checkpoint.pretrained import read_config\n"
        "from gradmap_pipeline.checkpoint.skeleton import build_skeleton\n"
        "from gradmap_pipeline.errors import ModelError; import transformers\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)); folder = Path('model')\n"
        "tensors = open_folder(folder).base.tensors; config = json.loads((folder / 'config.json').read_text())\n"
        "for change in json.loads(sys.argv[1]):\n"
        "    (folder / 'config.json').write_text(json.dumps({**config, **change}))\n"
        "    try: build_skeleton(read_config(folder), tensors); print('built', change)\n"
        "    except ModelError as error: print('refused', error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    changes = [{"head_dim": 1 << 28}, {"intermediate_size": 1 << 40}, {"hidden_size": 1 << 20}, {"num_hidden_layers": 20_000}]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(changes)], capture_output=True, text=True, check=True)
    *said, resident = done.stdout.splitlines()
    assert len(said) == len(changes)
    assert all("its numbers do not fit the weights beside it" in line for line in said), said
    assert int(resident) < 1 << 20  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_config_that_names_another_type_is_said(model: Path) -> None:
    change_config(model, dtype="bfloat16")
    export = [{"use": "export", "with": {"to": "out", "overwrite": True}}]
    said = "config.json says bfloat16, and the weights are stored in float32: programs that go by the config convert them"
    result = gradmap("run", steps=export)
    assert result.exit_code == 0, result.output
    assert said in result.output
    result = gradmap("run", {"path": "model", "dtype": "bfloat16"}, export)
    assert said not in result.output
    assert load_file("out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_large_tied_embeddings_are_no_reason_to_refuse(tmp_path: Path) -> None:
    """More than half of all weights are embeddings, as in Gemma 3 270M; transformers registers them three times."""
    model = make_model(tmp_path / "model", tied=True, vocab_size=50_000)
    graph = open_folder(model)
    skeleton = build_skeleton(read_config(model), graph.base.tensors)
    assert sum(parameter.numel() for parameter in skeleton.parameters()) == graph.count_parameters()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"\xff\xfe{}", "config.json' cannot be read: it is not UTF-8 at byte 0"),
        ("config.json", b"[" * 200_000, "config.json' cannot be read: it is nested too deeply"),
        ("config.json", b'{"a":' * 100 + b"1" + b"}" * 100, "config.json' cannot be read: it is nested more than 64 levels deep"),
        ("config.json", b"3", "config.json' must hold a JSON object, found int"),
        ("config.json", b"", "config.json' cannot be read: Expecting value"),
        ("config.json", b'{"num_hidden_layers": ' + b"9" * 5000 + b"}", "config.json' cannot be read: Exceeds the limit"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json' cannot be read: Expecting property name"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json' must hold a JSON object, found list"),
        ("generation_config.json", b"nothing", "generation_config.json' cannot be read: Expecting value"),
        ("generation_config.json", b"\xff", "generation_config.json' cannot be read: it is not UTF-8"),
        ("special_tokens_map.json", b"[1]", "special_tokens_map.json' must hold a JSON object, found list"),
    ],
)
def test_json_that_is_none(name: str, content: bytes, message: str, model: Path) -> None:
    (model / name).write_bytes(content)
    assert_refused(message, "check", "run", "plan")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"garbage"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer.json", b"\x00" * 100),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused_before_any_step(name: str, content: bytes, model: Path) -> None:
    (model / name).write_bytes(content)
    assert_refused("has no tokenizer that transformers can load", "run", "plan")


def test_a_generation_config_that_transformers_refuses(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": -3}))
    assert_refused("generation_config.json' is refused by transformers", "check", "run")


def test_names_that_transformers_has_no_such_thing_for(model: Path) -> None:
    """They are told with the field and what the tables of transformers have."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    change_config(model, hidden_act="foo")
    accepted = f"accepted: {', '.join(ACT2FN)} (transformers' ACT2FN)"
    assert_refused(f"transformers cannot build this model: 'hidden_act' is 'foo'; {accepted}", "check", "run")
    change_config(model, hidden_act="silu", rope_parameters={"rope_type": "foo", "rope_theta": 1e4})
    accepted = f"accepted: default, {', '.join(ROPE_INIT_FUNCTIONS)} (transformers' ROPE_INIT_FUNCTIONS)"
    assert_refused(f"'rope_parameters.rope_type' is 'foo'; {accepted}", "check", "run")
    change_config(model, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, hidden_activation="foo")
    assert gradmap("check").exit_code == 0, "Llama has no such field"


def test_a_field_of_another_type_is_told_with_the_reason(model: Path) -> None:
    change_config(model, rms_norm_eps="a")
    assert_refused(
        "Validation error for field 'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float, got str (value: 'a')",
        "check",
        "run",
    )


# What a config asks of programs, and not of the model

WHOLE = [
    {"use": "calibrate", "with": {"dataset": {"path": "text.txt"}, "samples": 2, "sequence_length": 16}},
    {"use": "gradmap_score", "with": {"layers": 1}},
    {"use": "prune", "with": {"layers": 1}},
    {"use": "evaluate", "with": {"dataset": {"path": "text.txt"}, "samples": 2, "sequence_length": 16}},
    {"use": "export", "with": {"to": "out"}},
]


@pytest.mark.parametrize("named", ["BertModel", "LlamaForSequenceClassification", "LlamaModel", "MistralForCausalLM"])
def test_an_export_names_the_class_that_it_is_of(named: str, model: Path) -> None:
    """Programs besides transformers go by the class, and transformers by the model type."""
    change_config(model, architectures=[named])
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    said = " ".join(result.stdout.split())
    assert f"config.json of the model names the class {named}; the export's names LlamaForCausalLM, which it is" in said


@pytest.mark.parametrize("is_equal", [False, True])
def test_an_export_says_that_its_head_is_its_own(is_equal: bool, model: Path) -> None:
    """Where the config ties what the checkpoint holds as two, transformers goes by the values, and other programs by the config."""
    change_config(model, tie_word_embeddings=True)
    weights = load_file(model / "model.safetensors")
    if is_equal:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = gradmap("run")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is is_equal
    told = "`tie_word_embeddings: true`, and its checkpoint holds a head that differs from the embeddings; the export's says false"
    assert (told in " ".join(result.stdout.split())) is not is_equal
    assert torch.equal(load_file("out/model.safetensors")["lm_head.weight"], weights["lm_head.weight"])


@pytest.mark.parametrize("named", [5, "LlamaForCausalLM", [5]])
def test_classes_that_are_no_list_of_names_are_refused(named: Any, model: Path) -> None:
    change_config(model, architectures=named)
    assert_refused("as 'architectures'; accepted: a list of names of classes", "check", "run")


def test_an_empty_quantisation_is_told_before_any_work(model: Path) -> None:
    change_config(model, quantization_config={})
    assert_refused("has an empty 'quantization_config', which transformers refuses; remove it", "check", "run")


def test_what_a_config_asks_of_every_call_changes_nothing(model: Path, text: Path) -> None:
    """Tuples for outputs, outputs besides, and checkpointing: the same layers and perplexity as without, and no word of it."""
    shutil.copy(text, "text.txt")
    plain = gradmap("run", steps=WHOLE)
    assert plain.exit_code == 0, plain.output
    lineage = json.loads(Path("out/gradmap.json").read_text())
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "gradient_checkpointing": True}
    change_config(model, **asked)
    result = gradmap("run", steps=WHOLE)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    again = json.loads(Path("out/gradmap.json").read_text())
    assert again["layers_kept"] == lineage["layers_kept"]
    values = [[(metric["name"], metric["value"]) for metric in made["metrics"]] for made in (lineage, again)]
    assert values[0] == values[1]
    assert values[0][0][0] == "perplexity"
    assert asked.items() <= json.loads(Path("out/config.json").read_text()).items()
