"""Text to token ids: every kind of source, packing, padding, seeds, and what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradmap_plugins.calibrate import Calibrate
from pydantic import ValidationError
from tiny import make_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gradmap_pipeline import CalibrationSet, DatasetSource, StageError
from gradmap_pipeline.builtin.text import load_documents, load_training_documents
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.data import check_tokenizer, encoding, load_tokenizer, make_sequences
from gradmap_pipeline.data.sequences import count_rows
from gradmap_pipeline.errors import ModelError, OptionError
from gradmap_pipeline.testing import run_stage

TEXTS = ["first text", "second, with a\nnew line", "third"]
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer(llama: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(open_folder(llama).base)


def write(folder: Path, suffix: str, texts: list[str] = TEXTS, column: str = "text") -> Path:
    file = folder / f"data{suffix}"
    if suffix == ".txt":
        file.write_text(texts[0])
    elif suffix in (".jsonl", ".json"):
        file.write_text("".join(json.dumps({column: text, "other": 1}) + "\n" for text in texts))
    elif suffix == ".csv":
        with file.open("w", newline="") as stream:
            csv.writer(stream).writerows([[column, "other"], *([text, 1] for text in texts)])
    elif suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_dict({column: texts, "other": [1] * len(texts)}).to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    texts = TEXTS[:1] if suffix == ".txt" else TEXTS
    file = write(tmp_path, suffix)
    assert list(DatasetSource(path=file).documents()) == texts
    assert list(DatasetSource(path=tmp_path).documents()) == texts
    if suffix != ".txt":
        write(tmp_path, suffix, column="body")
        assert list(DatasetSource(path=file, column="body").documents()) == texts
        with pytest.raises(StageError, match=r"has no column 'text'; its columns are \['body', 'other'\]; set 'column'"):
            list(DatasetSource(path=file).documents())


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}\nline two")
    (tmp_path / "notes.md").write_text("not data")
    assert list(DatasetSource(path=tmp_path).documents()) == [f"text {name}\nline two" for name in "abc"]


def test_empty_texts_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", ["one", "", " \n", "two"])
    assert list(DatasetSource(path=file).documents()) == ["one", "two"]


def test_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as many rows are read as are asked for, and every option reaches `datasets`."""
    asked: dict[str, Any] = {}
    read: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number in range(10**6):
            read.append(number)
            yield {"body": f"text {number}"}

    def load_dataset(path: str, **options: Any) -> Any:
        from datasets import IterableDataset

        asked.update(id=path, **options)
        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = DatasetSource(id="owner/name", config="en", split="validation", column="body", revision="abc")
    documents = source.documents()
    assert [next(documents) for _ in range(3)] == ["text 0", "text 1", "text 2"]
    assert len(read) < 100
    assert asked == {"id": "owner/name", "name": "en", "split": "validation", "revision": "abc", "streaming": True}
    shuffled = source.documents(shuffle_seed=0)
    assert [next(shuffled) for _ in range(3)] != ["text 0", "text 1", "text 2"]


def test_hub_data_set_without_a_network() -> None:
    with pytest.raises(StageError) as caught:
        next(DatasetSource(id="nobody/nothing", config="en").documents())
    message = str(caught.value)
    assert message.startswith("cannot read data set 'nobody/nothing en train' from the Hugging Face hub (")
    assert message.endswith("check the name and the network, or use a local file: `dataset: {path: FILE}`")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of 'path', 'id' and 'builtin'; found none"),
        ({"id": "a/b", "builtin": "heldout"}, "found 'id' and 'builtin'"),
        ({"builtin": "heldout", "split": "test"}, "'split' belongs to a hub data set, given by 'id'"),
        ({"builtin": "heldout", "column": "body"}, "'column' does not go with 'builtin'"),
        ({"path": "away.txt"}, "no file or folder 'away.txt'; relative paths start at the current folder"),
        ({"path": "notes.md"}, r"'notes.md' is not, and does not hold, a file of the kinds .txt, .jsonl"),
        ({"path": "mixed"}, "folder 'mixed' mixes files of the kinds .csv, .txt; name one file, or split the folder"),
    ],
)
def test_source_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", ".txt")
    write(tmp_path / "mixed", ".csv")
    with pytest.raises(ValidationError, match=message):
        DatasetSource(**options)


def test_packing_joins_texts_and_starts_every_sequence_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = make_sequences(tokenizer, TEXTS, 8, None)
    left = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    for row in ids.tolist():
        wanted = left[:8] if left[0] == BOS else [BOS, *left[:7]]  # one BOS, also where a text begins
        assert row == wanted
        left = left[8 if left[0] == BOS else 7 :]
    assert len(left) < 8
    assert mask.all()


@pytest.mark.parametrize("together", [1, 12, 30])
def test_texts_are_tokenised_once_however_many_go_together(
    together: int, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = make_sequences(tokenizer, TEXTS * 3, 8, None)
    monkeypatch.setattr(encoding, "ENCODE_TOGETHER", together)
    few = make_sequences(tokenizer, TEXTS * 3, 8, None)
    assert torch.equal(at_once[0], few[0])


def test_packing_without_bos_separates_texts_with_eos(tokenizer: PreTrainedTokenizerBase, llama: Path) -> None:
    plain = AutoTokenizer.from_pretrained(llama)
    plain.backend_tokenizer.post_processor = None
    ids, _ = make_sequences(plain, TEXTS, 8, None)
    joined = [token for text in TEXTS for token in [*plain(text)["input_ids"], EOS]]
    assert ids.flatten().tolist() == joined[: len(joined) // 8 * 8]


def test_one_text_a_sequence_cut_and_padded(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = make_sequences(tokenizer, TEXTS, 12, None, "none")
    wanted = [tokenizer(text)["input_ids"][:12] for text in TEXTS]
    assert mask.sum(1).tolist() == [11, 12, 6]
    assert [row[: int(kept.sum())].tolist() for row, kept in zip(ids, mask, strict=True)] == wanted
    assert not ids[mask == 0].any()


def test_texts_too_short_to_predict_are_passed_over(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, _ = make_sequences(tokenizer, ["one", "", "two", "three", "four"], 8, 4, "none")
    assert len(ids) == 4


def test_drawing_follows_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [f"text number {number}" for number in range(200)]
    drawn = {seed: make_sequences(tokenizer, texts, 16, 6, seed=seed)[0] for seed in (1, 2)}
    assert torch.equal(drawn[1], make_sequences(tokenizer, texts, 16, 6, seed=1)[0])
    assert not torch.equal(drawn[1], drawn[2])
    everything = {tuple(row) for row in make_sequences(tokenizer, texts, 16, None)[0].tolist()}
    assert {tuple(row) for row in drawn[1].tolist()} <= everything
    assert len({tuple(row) for row in drawn[1].tolist()}) == 6


def test_too_little_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(StageError, match=r"gives only 3 of 9 samples of 12 tokens; lower 'samples' or 'sequence_length', or use"):
        make_sequences(tokenizer, TEXTS, 12, 9)
    with pytest.raises(StageError, match="gives no sample of 4000 tokens; lower 'sequence_length', or use more text"):
        make_sequences(tokenizer, TEXTS, 4000, None)


def test_calibration_remembers_its_tokenizer(llama: Path, text: Path, tmp_path: Path) -> None:
    model = open_folder(llama)
    stage = Calibrate.model_validate({"dataset": {"path": text}, "samples": 4, "sequence_length": 16})
    calibration: CalibrationSet = run_stage(stage, tmp_path / "step", model=model).calibration
    assert (calibration.samples, calibration.sequence_length, calibration.tokens) == (4, 16, 64)
    ids, mask = calibration.load()
    assert (ids.dtype, tuple(ids.shape), tuple(mask.shape)) == (torch.int64, (4, 16), (4, 16))
    check_tokenizer(calibration, model)
    make_model(tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("</s>", "<s>"))
    with pytest.raises(StageError, match=r"was made with another tokenizer than that of .*; calibrate on it"):
        check_tokenizer(calibration, open_folder(tmp_path / "other"))


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer that transformers can load"):
        load_tokenizer(open_folder(folder).base)


def test_builtin_texts_share_nothing() -> None:
    calibration, heldout, training = load_documents("calibration"), load_documents("heldout"), load_training_documents()
    assert len(calibration) > 200
    assert len(heldout) > 20
    assert not set(calibration) & set(heldout)
    assert not set(training) & set(heldout)
    assert set(calibration) <= set(training)
    assert load_documents("heldout") == heldout
    assert list(DatasetSource(builtin="heldout").documents()) == heldout
    shuffled = list(DatasetSource(builtin="heldout").documents(shuffle_seed=1))
    assert shuffled != heldout
    assert sorted(shuffled) == sorted(heldout)


def test_fingerprint_follows_the_text(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl")

    def fingerprint(**options: Any) -> Any:
        return DatasetSource(path=file, **options).fingerprint(lambda path: path.read_text())

    before = fingerprint()
    assert fingerprint(column="other") != before
    write(tmp_path, ".jsonl", TEXTS[:2])
    assert fingerprint() != before
    hub = [DatasetSource(id="a/b", revision=revision).fingerprint(lambda path: "") for revision in ("one", "two")]
    assert hub[0] != hub[1]


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_a_text_that_is_a_little_too_short_is_refused_by_its_tokens(packing: str, llama: Path, tmp_path: Path) -> None:
    """At the very number of samples that the run refuses, and in its words."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {number} of a few"}) + "\n" for number in range(40)))
    source, base = DatasetSource(path=file), open_folder(llama).base
    tokenizer = load_tokenizer(base)
    most = count_rows(tokenizer, source.documents(), 16, 1000, packing)
    assert 0 < most < 1000
    source.check_gives(most, 16, packing, lambda: tokenizer)
    with pytest.raises(OptionError) as refused:
        source.check_gives(most + 1, 16, packing, lambda: tokenizer)
    assert refused.value.option == "samples"
    with pytest.raises(StageError) as failed:
        make_sequences(tokenizer, source.documents(), 16, most + 1, packing)
    assert str(refused.value) == str(failed.value)
    assert f"gives only {most} of {most + 1} samples" in str(failed.value)


def test_texts_that_are_large_or_elsewhere_are_not_tokenised(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a" * 8 * 4 * 16)
    for source in (DatasetSource(path=tmp_path / "text.txt"), DatasetSource(id="some/data"), DatasetSource(builtin="heldout")):
        source.check_gives(4, 16, "documents", lambda: pytest.fail("nothing is tokenised"))
