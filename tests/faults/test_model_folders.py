"""Folders that are no model, or not the one their config says: one line, exit code 2, before any step."""

from __future__ import annotations

import json
import os
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
from tiny import make_model
from typer.testing import CliRunner, Result

from gradmap_pipeline.cli import app
from gradmap_pipeline.errors import ModelError
from gradmap_pipeline.model.checkpoint import read_folder, read_header
from gradmap_pipeline.model.graph import open_folder, open_model
from gradmap_pipeline.model.pretrained import read_config
from gradmap_pipeline.model.source import ModelSource, check_model_folder
from gradmap_pipeline.model.survey import Survey

PRUNE: list[dict[str, Any]] = [{"use": "prune", "with": {"layers": [1]}}, {"use": "export", "with": {"to": "out"}}]
Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the current folder holds it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(llama, tmp_path / "model"))


def gradmap(command: str, source: dict[str, Any] | None = None, steps: list[dict[str, Any]] = PRUNE) -> Result:
    Path("r.yaml").write_text(json.dumps({"version": 1, "model": source or {"path": "model"}, "steps": steps}))
    return CliRunner().invoke(app, [command, "r.yaml"])


def assert_refused(message: str, *commands: str, source: dict[str, Any] | None = None) -> None:
    """One line, exit code 2, and nothing written."""
    for command in commands:
        result = gradmap(command, source)
        said = " ".join(result.stderr.split())
        assert message in said, result.output
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert not Path("out").exists()


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, Any]:
    """Cut the model into two shards; return the index, which is written."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


# Links


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "model.safetensors", "config.json", "additional_chat_templates/a.jinja"]
)
def test_links_out_of_the_folder_are_refused(name: str, model: Path) -> None:
    outside = model.parent / "outside"
    outside.mkdir()
    file = model / name
    file.parent.mkdir(exist_ok=True)
    if file.exists():
        file.rename(outside / file.name)
    else:
        (outside / file.name).write_text("{{ messages }}")
    file.symlink_to(outside / file.name)
    assert_refused(
        f"{name}' is a link to '{outside / file.name}', outside the model folder; put the file itself there", "check", "run"
    )
    with pytest.raises(ModelError, match="outside the model folder"):
        open_folder(model)


def test_a_folder_of_templates_that_is_a_link_is_refused(model: Path) -> None:
    (model / "additional_chat_templates").symlink_to("/etc")
    assert_refused("additional_chat_templates' is a link to '/etc', outside the model folder", "check")


def test_a_link_to_itself_is_refused(model: Path) -> None:
    (model / "LICENSE").symlink_to("LICENSE")
    result = gradmap("check")
    assert result.exit_code in (0, 2)
    assert "Traceback" not in result.output


def test_links_of_the_hub_cache_and_inside_the_folder_are_followed(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "LICENSE").symlink_to("config.json")
    check_model_folder(snapshot)
    graph = open_folder(snapshot)
    assert graph.base.tokenizer_sha256 == open_folder(model).base.tokenizer_sha256
    assert {"LICENSE", "tokenizer.json"} <= {file.name for file in graph.base.companion_files()}
    (snapshot / "NOTICE").symlink_to("../../refs")
    (root / "refs").write_text("")
    with pytest.raises(ModelError, match=r"NOTICE' is a link to .* outside the model folder"):
        check_model_folder(snapshot)


# Index and shards


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/tmp/other.safetensors", "a/../../b.safetensors", "weights.bin", "a\\b.safetensors"]
)
def test_an_index_names_files_of_its_folder(name: str, model: Path) -> None:
    index = shard(model)
    index["weight_map"][Q1] = name
    write_index(model, index)
    (model.parent / "other.safetensors").write_bytes(b"")
    assert_refused(f"names {name!r}, which is not a safetensors file in its folder", "check", "run")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "model.safetensors.index.json' cannot be read: Expecting value"),
        ("<html>Access denied</html>", "model.safetensors.index.json' cannot be read: Expecting value"),
        ("[]", "must hold a JSON object, found list"),
        ("{}", "must hold a 'weight_map' from the names of tensors to files; download it again"),
        ({"weight_map": []}, "must hold a 'weight_map'"),
        ({"weight_map": {}}, "must hold a 'weight_map'"),
        ({"weight_map": {"a": 3}}, "must hold a 'weight_map'"),
        ({"weight_map": None}, "must hold a 'weight_map'"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"weight_map": ' + '{"a":' * 90 + "1" + "}" * 91, "is nested more than 64 levels deep"),
    ],
)
def test_a_broken_index(index: Any, message: str, model: Path) -> None:
    shard(model)
    write_index(model, index)
    assert_refused(message, "check", "run")


def test_shards_and_index_must_agree(model: Path) -> None:
    index = shard(model)
    second = model / "model-00002-of-00002.safetensors"
    check_model_folder(model)
    assert open_folder(model).count_parameters() == sum(tensor.elements for tensor in read_folder(model).values())
    index["weight_map"]["model.other"] = second.name
    write_index(model, index)
    assert_refused(f"lacks 'model.other', which its index says is in {second.name!r}; download it again", "run", "plan")
    del index["weight_map"]["model.other"]
    write_index(model, index)
    first = load_file(model / "model-00001-of-00002.safetensors")
    save_file({**load_file(second), next(iter(first)): next(iter(first.values()))}, second, metadata={"format": "pt"})
    assert_refused(f"holds {next(iter(first))!r} twice, in 'model-00001-of-00002.safetensors' and {second.name!r}", "run")
    second.unlink()
    assert_refused(f"lacks the shard {second.name!r} that its index names; download it again", "check", "run")


# Adapters and pointers


def test_an_adapter_is_to_be_merged(model: Path) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}))
    message = "holds an adapter (adapter_config.json) beside the model's weights, and transformers may add it to them; merge it"
    assert_refused(message, "check", "run")
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    alone = "is an adapter of 'owner/base': merge it first (merge_and_unload of peft), and prune the merged model"
    assert_refused(alone, "check", "run")
    (model / "config.json").unlink()
    assert_refused(alone, "check", "run")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_told(name: str, model: Path) -> None:
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert_refused(f"'model/{name}' is a git-lfs pointer, not the file itself; run `git lfs pull` in 'model'", "check", "run")


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
        ({Q1: torch.zeros(8, 32)}, f"'{Q1}' has shape (8, 32) in the checkpoint, but its config asks for (32, 32)"),
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
    Survey(open_folder(model), 1 << 30).check_loadable()
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


def test_a_huge_config_takes_no_memory(model: Path) -> None:
    """In a process that may have 6 GiB of addresses, of which torch alone takes four."""
    code = (
        "import sys, json, resource; from pathlib import Path\n"
        "from gradmap_pipeline.cli import app; from gradmap_pipeline.model.graph import open_folder\n"
        "from gradmap_pipeline.model.pretrained import read_config; from gradmap_pipeline.model.skeleton import build_skeleton\n"
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
    assert_refused("generation_config.json' is refused by transformers", "run")


# Where a model is


@pytest.mark.parametrize(
    "name", ["a b", "../x", "a//b", "/x", "x/", "a" * 300, "a/b/c", "owner/..", ".", "a\nb", "-x/y", "x/y.git", "owner/na*me"]
)
def test_names_that_no_hub_model_has(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = gradmap("check", {"id": name})
    assert result.exit_code == 2
    assert "accepted: the name of a hub model, as owner/name" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("revision", ["../main", "a b", "/main", "a//b", "x" * 300, "a\\b", "a\nb", "", "refs/../x"])
def test_revisions_that_are_none(revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = gradmap("check", {"id": "owner/name", "revision": revision})
    assert result.exit_code == 2
    assert "accepted: a commit, tag or branch" in result.stderr


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "v1.0", "0" * 40])
def test_revisions_that_may_be(revision: str) -> None:
    assert ModelSource(id="owner/name", revision=revision).revision == revision


@pytest.mark.parametrize("path", ["a\0b", "a" * 5000, "x" * 300])
def test_paths_that_cannot_be(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused("", "check", "run", source={"path": path})


def test_a_file_in_place_of_a_folder(model: Path) -> None:
    assert_refused("config.json' is a file; name the folder of a model", "check", source={"path": "model/config.json"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(model: Path) -> None:
    model.chmod(0)
    try:
        assert_refused("'model' cannot be read: Permission denied", "check")
    finally:
        model.chmod(0o755)


def test_configs_leave_no_temporary_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither after use, nor when the process was killed meanwhile: the next one clears it away."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    content = json.loads((model / "config.json").read_text())
    assert read_config(model, {**content, "num_hidden_layers": 2}).num_hidden_layers == 2
    assert not list(place.iterdir())
    killed = (
        "import os, tempfile; tempfile.tempdir = os.environ['PLACE']\n"
        "from gradmap_pipeline.partial import scratch_folder\n"
        "with scratch_folder(): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", killed], env={**os.environ, "PLACE": str(place)}, check=False)
    assert list(place.iterdir())
    read_config(model, content)
    assert not list(place.iterdir())


def test_the_digest_of_a_tokenizer_is_of_all_that_it_depends_on(model: Path) -> None:
    seen = {open_folder(model).base.tokenizer_sha256}
    for name, content in (
        ("emoji.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tools.jinja", "{{ tools }}"),
        ("spiece.model", "x"),
        ("bpe.codes", "x"),
        ("tekken.json", "{}"),
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
        seen.add(open_folder(model).base.tokenizer_sha256)
    change_config(model, tokenizer_class="GPT2Tokenizer")
    seen.add(open_folder(model).base.tokenizer_sha256)
    assert len(seen) == 8
    before = open_folder(model).base.tokenizer_sha256
    (model / "README.md").write_text("x")
    assert open_folder(model).base.tokenizer_sha256 == before


def test_a_model_that_is_fine_still_is(llama: Path) -> None:
    assert open_model(ModelSource(path=llama)).layers == (0, 1, 2, 3)
