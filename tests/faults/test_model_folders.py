"""Folders that are no model: links out of them, indexes, adapters, pointers, names. One line, exit code 2, before any step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from spoilt import Q1, assert_refused, change_config, gradmap, shard, write_index

from gradmap_pipeline.checkpoint.checkpoint import read_folder
from gradmap_pipeline.checkpoint.graph import open_folder, open_model
from gradmap_pipeline.checkpoint.pretrained import read_config
from gradmap_pipeline.checkpoint.source import ModelSource, check_model_folder
from gradmap_pipeline.errors import ModelError


@pytest.fixture
def model(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil; the current folder holds it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(llama, tmp_path / "model"))


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
    "name", ["../other.safetensors", "/elsewhere/other.safetensors", "a/../../b.safetensors", "weights.bin", "a\\b.safetensors"]
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
        "from gradmap_pipeline.machine.atomic_folder import scratch_folder\n"
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


# What is not a file


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
def test_what_is_no_file_is_named_as_such(name: str, model: Path) -> None:
    file = model / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    assert_refused(f"{name}' is a named pipe, not a file", "check", "run", "plan")
    file.unlink()
    file.mkdir()
    assert_refused(f"{name}' is a folder, not a file", "check", "run")
    file.rmdir()
    file.symlink_to("nowhere")
    assert_refused(f"{name}' is a link to 'nowhere', where nothing is, not a file", "check", "run")


def test_folders_of_other_programs_are_let_be(model: Path) -> None:
    (model / "runs").mkdir()
    (model / ".cache").mkdir()
    assert gradmap("check").exit_code == 0
