"""Local data: the file that is named is read, whatever its name; and what cannot be read is told with its file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError
from typer.testing import CliRunner

from gradmap_pipeline import DatasetSource, StageError
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.cli import app
from gradmap_pipeline.data import load_tokenizer, make_sequences
from gradmap_pipeline.data.documents import Chat, LongText
from gradmap_pipeline.data.files import find_files

TEXTS = ["first", "second, with a\nnew line", "third"]
NAMES = [
    "part[1]",
    "a*b",
    "a?b",
    "{a,b}",
    "a#b",
    "100%20",
    "a::b",
    "c:d",
    "a!b",
    " a b ",
    "数据é",
    "a\nb",
    "~x",
    "-x",
    "http:",
    "$HOME",
]


def write(file: Path, ending: str, texts: list[Any] = TEXTS, column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: texts})
    if ending == ".txt":
        file.write_text(texts[0])
    elif ending == ".jsonl":
        file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    elif ending == ".json":
        file.write_text(json.dumps([{column: text} for text in texts], indent=1))
    elif ending == ".csv":
        quoted = ['"' + str(text).replace('"', '""') + '"' for text in [column, *texts]]
        file.write_text("\n".join(quoted))
    elif ending == ".parquet":
        with file.open("wb") as sink:  # pyarrow takes some names for addresses
            parquet.write_table(table, sink)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return file


def read(path: Path, **options: Any) -> list[Any]:
    documents = DatasetSource(path=path, **options).documents()
    return ["".join(document.parts()) if isinstance(document, LongText) else document for document in documents]


def refusal(path: Path, **options: Any) -> str:
    """What is said, when the recipe is checked or when the data are read."""
    try:
        source = DatasetSource(path=path, **options)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    with pytest.raises(StageError) as caught:
        list(source.documents())
    return str(caught.value)


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("name", NAMES)
def test_the_file_that_is_named_is_read(name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compressed = Path(f"{name}.jsonl.zst")
    compressed.write_bytes(pa.compress(b'{"text": "x"}', "zstd", asbytes=True))
    assert read(compressed) == ["x"]
    for other in ("part1", "ab", "axb", "a", "b", "100 "):
        write(tmp_path / f"{other}{ending}", ending, ["wrong"])
        write(tmp_path / other / f"x{ending}", ending, ["wrong"])
    wanted = TEXTS[:1] if ending == ".txt" else TEXTS
    assert read(write(Path(f"{name}{ending}"), ending)) == wanted
    write(Path(name, f"{name}{ending}"), ending)
    assert read(Path(name)) == wanted


def test_brackets_in_a_recipe(llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = text.read_text()
    for name, content in (("part[1].txt", words[:4000]), ("plain.txt", words[:4000]), ("part1.txt", words[4000:8000])):
        Path(name).write_text(content)
    perplexities = {}
    for name in ("part[1].txt", "plain.txt", "part1.txt"):
        step = {"use": "evaluate", "with": {"dataset": {"path": name}, "samples": 8, "sequence_length": 32}}
        Path("r.yaml").write_text(json.dumps({"version": 1, "model": {"path": str(llama)}, "steps": [step]}))
        result = CliRunner().invoke(app, ["run", "r.yaml", "--json", "--store", f"store {name}"])
        assert result.exit_code == 0, result.stderr
        (line,) = [json.loads(line) for line in result.stdout.splitlines() if '"step_finished"' in line]
        perplexities[name] = line["outputs"]["evaluation"]["perplexity"]
    assert perplexities["part[1].txt"] == perplexities["plain.txt"] != perplexities["part1.txt"]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read(ending: str, suffix: str, tmp_path: Path) -> None:
    plain = write(tmp_path / f"plain{ending}", ending).read_bytes()
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packed = pa.compress(plain, "zstd", asbytes=True) if suffix == ".zst" else packers[suffix](plain)
    file = tmp_path / f"data{ending}{suffix}"
    file.write_bytes(packed)
    assert read(file) == read(tmp_path / f"plain{ending}")
    file.write_bytes(packed[: len(packed) // 2])
    assert str(file) in refusal(file)


def test_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read(tmp_path / "a.txt") == ["one\ntwo\nthree"]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert read(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext\r\n"one\r\ntwo"\r\n\r\nNA\r\n')
    assert read(tmp_path / "a.csv") == ["one\r\ntwo", "NA"]


def test_a_long_list_of_json_is_read_as_it_goes(tmp_path: Path) -> None:
    rows = [{"text": f"text {number} " * (number % 7), "n": [number, {"x": "]"}]} for number in range(2000)]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent))
        assert read(tmp_path / "a.json") == [row["text"] for row in rows if row["text"]]
    (tmp_path / "a.json").write_text("[]\n")
    assert "holds no text" in refusal(tmp_path / "a.json")


CONTENTS = {
    "latin-1": (
        "a.txt",
        b"one\ntwo\ncaf\xe9 au lait\n",
        "line 3: byte 0xE9 is not text in UTF-8 (invalid continuation byte); convert",
    ),
    "latin-1 in JSON": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "line 2: byte 0xE9 is not text in UTF-8"),
    "latin-1 in CSV": ("a.csv", b"text\nx\n\xe9\n", "line 3: byte 0xE9 is not text in UTF-8"),
    "cut in a character": ("a.txt", "né".encode()[:-1], "line 1: byte 0xC3 is not text in UTF-8 (unexpected end of data)"),
    "utf-16": ("a.txt", "text".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
    "empty text": ("a.txt", b"", "is empty; it must hold text"),
    "empty JSON lines": ("a.jsonl", b"", "is empty; it must hold text"),
    "blank": ("a.txt", b" \n\n", "holds no text: every row is empty or null"),
    "blank lines": ("a.jsonl", b"\n\n", "holds no text"),
    "header only": ("a.csv", b"text\n", "holds no text"),
    "null rows": ("a.jsonl", b'{"text": null}\n{"text": ""}\n', "holds no text"),
    "broken line": ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "line 2: this is not valid JSON (Expecting ',' delimiter"),
    "pretty object": ("a.json", b'{\n "text": "x"\n}', "line 1: this is not valid JSON"),
    "rows of text": ("a.jsonl", b'"x"\n', "line 1: found text, where each row must be a JSON object, as {'text': …}"),
    "list in a line": ("a.jsonl", b'{"text": "x"}\n["y"]\n', "line 2: found a list of 1 that starts with text"),
    "list that does not end": ("a.json", b'[{"text": "x"},\n\n', "line 3: the list does not end; the file is cut short"),
    "list without a comma": (
        "a.json",
        b'[{"text": "x"}\n{"text": "y"}]',
        "line 2: this is not valid JSON (a comma or ] is missing)",
    ),
    "broken list": ("a.json", b'[{"text": "x"},\n{"text": y}]', "line 2: this is not valid JSON (Expecting value"),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: this is not valid JSON (it is nested too deeply)"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud83d"}\n', "line 1: the text holds half of a surrogate pair, which is not a character"),
    "number": ("a.jsonl", b'{"text": "x"}\n{"text": 12}\n', "line 2: found a number (12), where text is wanted; set 'column'"),
    "mapping": ("a.jsonl", b'{"text": {"en": "x"}}\n', "line 1: found a mapping with the keys ['en'], where text is wanted"),
    "list of texts": ("a.jsonl", b'{"text": ["x"]}\n', "line 1: found a list of 1 that starts with text, where text is wanted"),
    "other chat": (
        "a.jsonl",
        b'{"text": [{"from": "human", "value": "x"}]}\n',
        "found a list of 1 that starts with a mapping with the keys ['from', 'value'], where text is wanted; set 'column' to one "
        "that holds text, or chat messages: a list of {role: …, content: …}",
    ),
    "missing column": ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', "line 2: has no column 'text'; its columns are ['body']; set"),
    "CSV without a header": (
        "a.csv",
        b"one,1\ntwo,2\n",
        "line 1: has no column 'text'; its columns are ['one', '1']; set 'column'",
    ),
    "CSV with a short row": ("a.csv", b'text,n\n"x\ny",1\nz\n', "line 4: found 1 values, but 2 columns"),
    "CSV with a long row": ("a.csv", b"text,n\nx,1,2\n", "line 2: found 3 values, but 2 columns"),
    "CSV with an open quote": ("a.csv", b'text\nx\n"y\n', "line 3: this is not valid CSV (unexpected end of data)"),
    "CSV with a column twice": ("a.csv", b"text,text\nx,y\n", "line 1: 2 columns are named 'text'"),
    "damaged parquet": ("a.parquet", b"PAR1" + b"x" * 100, "is damaged, or not what its name says (Parquet magic bytes not found"),
    "damaged arrow": ("a.arrow", b"x" * 100, "is damaged, or not what its name says ("),
    "gzip without its suffix": ("a.jsonl", gzip.compress(b"x"), "is compressed by gzip; its name must end in .gz"),
    "not gzip": ("a.jsonl.gz", b'{"text": "x"}\n', "is damaged, or not what its name says (Not a gzipped file"),
    "git-lfs": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a git-lfs pointer, not the",
    ),
    "parquet in gzip": ("a.parquet.gz", b"x", "is not, and does not hold, a file of the kinds .txt, .jsonl"),
    "archive": ("a.zip", b"x", "is not, and does not hold, a file of the kinds .txt, .jsonl"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_what_is_said_of_a_file(case: str, tmp_path: Path) -> None:
    name, content, message = CONTENTS[case]
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert str(tmp_path / name) in said
    assert message in said
    assert len(said) < 500


def test_long_field_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x " * 200_000 + "\n")
    assert read(tmp_path / "a.csv") == ["x " * 200_000]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_of_tables_that_hold_no_text(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{ending}"
    for values, said in (
        ([1, 2], "found a number (1)"),
        ([b"x"], "found bytes"),
        ([["x"]], "found a list of 1 that starts with text"),
    ):
        write(file, ending, values)
        assert f"row 1: {said}, where text is wanted" in refusal(file)
    write(file, ending, ["x"], column="body")
    assert "has no column 'text'; its columns are ['body']; set 'column'" in refusal(file)
    write(file, ending, [None, "x"])
    assert read(file) == ["x"]


def test_metadata_beside_the_data_is_not_data(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ".jsonl")
    for name in ("dataset_infos.json", "dataset_info.json", "state.json", ".hidden.json", "README.txt", "LICENSE.txt"):
        (tmp_path / name).write_text('{"default": {}}')
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".gitattributes").write_text("*.jsonl filter=lfs")
    source = DatasetSource(path=tmp_path)
    assert source.files() == [tmp_path / "train.jsonl"]
    assert source.local_paths() == [tmp_path, tmp_path / "train.jsonl"]
    assert read(tmp_path) == TEXTS
    assert DatasetSource(builtin="heldout").local_paths() == []


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == TEXTS
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "two")
    assert "name one of its folders: test, train" in refusal(tmp_path / "two")
    assert read(tmp_path / "two" / "train") == TEXTS


def test_folders_that_hold_no_data(llama: Path, tmp_path: Path) -> None:
    assert "is the folder of a model, not of data" in refusal(llama)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert "is the folder of an adapter, not of data" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is not, and does not hold, a file of the kinds" in refusal(tmp_path / "empty")
    (tmp_path / "x.txt").mkdir()
    assert "is not, and does not hold, a file of the kinds" in refusal(tmp_path / "x.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is neither a file nor a folder" in refusal(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    assert "no file or folder" in refusal(tmp_path / "gone.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", ".txt")
    file.chmod(0)
    assert "cannot be read: permission denied" in refusal(file)


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ strftime_now('%Y-%m-%d') }}"


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".arrow"])
def test_chats_go_through_the_chat_template(ending: str, llama: Path, tmp_path: Path) -> None:
    file = write(tmp_path / f"a{ending}", ending, [CHAT, CHAT], column="messages")
    source = DatasetSource(path=file, column="messages")
    assert all(isinstance(document, Chat) for document in source.documents())
    tokenizer = load_tokenizer(open_folder(llama).base)
    with pytest.raises(StageError, match=r"(line|row) 1: found chat messages, and the tokenizer has no chat template to make text"):
        make_sequences(tokenizer, source.documents(), 64, None, "none")
    tokenizer.chat_template = TEMPLATE
    ids, mask = make_sequences(tokenizer, source.documents(), 64, None, "none")
    rendered = "user:hi;assistant:yes;2024-07-26"
    assert [row[: int(kept.sum())].tolist() for row, kept in zip(ids, mask, strict=True)] == [tokenizer(rendered)["input_ids"]] * 2
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(StageError, match=r"the tokenizer's chat template refuses the messages .*roles must alternate"):
        make_sequences(tokenizer, source.documents(), 64, None)


def test_draws_do_not_depend_on_how_rows_are_stored(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)]
    files = [write(tmp_path / f"a{ending}", ending, texts) for ending in (".jsonl", ".json", ".csv", ".parquet", ".arrow")]
    drawn = [list(DatasetSource(path=file).documents(shuffle_seed=3)) for file in files]
    assert all(documents == drawn[0] for documents in drawn)
    assert drawn[0] != texts
    assert sorted(drawn[0]) == sorted(texts)
    assert drawn[0] != list(DatasetSource(path=files[0]).documents(shuffle_seed=4))


def test_what_is_no_file_in_a_folder_of_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl' is a named pipe, not a file"):
        find_files(tmp_path)
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"b\.jsonl' is a folder, not a file"):
        find_files(tmp_path)
