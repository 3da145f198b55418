"""A long text gives the same ids in windows as whole, whatever the tokenizer; and no more of it is read than the samples need."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gradmap_pipeline import DatasetSource
from gradmap_pipeline.builtin.text import load_documents
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.data import load_tokenizer, make_sequences
from gradmap_pipeline.data.documents import LONG_BYTES
from gradmap_pipeline.data.encoding import ENCODE_TOGETHER, encode_long

pytestmark = pytest.mark.full

SPECIAL = ["<unk>", "<s>", "</s>", "[CLS]", "[SEP]"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def long_text() -> str:
    """1.1 million characters: code and prose, with runs of spaces, other scripts, combining marks, emoji and special tokens."""
    source = random.Random(0)
    pieces = "".join(load_documents("heldout"))[:1_000_000].split("\n")
    odd = [
        "naïve café",
        "数据集 读取",
        "e\u0301a\u0308",
        "🙂🇩🇪👩‍👩‍👧",
        "</s>",
        " " * 40,
        "\t\t",
        "x" * 150,
        "ﬁ Ⅷ ①",
        "'s 'LL 12345678",
    ]
    for _ in range(4000):
        pieces.insert(source.randrange(len(pieces)), source.choice(odd))
    return "\n".join(pieces)


def train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator([long_text()[start : start + 2000] for start in range(0, 100_000, 2000)], trainer)
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = train(tokenizer, trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = train(tokenizer, trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def llama2() -> Tokenizer:
    """As converted from sentencepiece: no pre-tokenizer, so that merges may reach over any distance."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = train(trained, trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL + tokens))
    trained.pre_tokenizer = None
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return trained


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = train(tokenizer, trainers.UnigramTrainer(vocab_size=1000, special_tokens=SPECIAL, unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = train(tokenizer, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)])
    return tokenizer


def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken("import", lstrip=True, rstrip=True), "self"])
    return train(tokenizer, trainers.WordLevelTrainer(vocab_size=2000, special_tokens=SPECIAL))


KINDS = {tokenizer_type.__name__: tokenizer_type for tokenizer_type in (gpt2, llama3, llama2, unigram, wordpiece, words)}


@cache
def make(tokenizer_type: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=KINDS[tokenizer_type](), bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=10**30
    )


def parts_of(text: str, size: int = 65_536) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def differs_at(ids: list[int], wanted: list[int]) -> int | None:
    """The first place where two lists differ; pytest's own account of long lists takes minutes."""
    if ids == wanted:
        return None
    return next((index for index, pair in enumerate(zip(ids, wanted, strict=False)) if pair[0] != pair[1]), len(wanted))


@pytest.mark.parametrize("tokenizer_type", KINDS)
def test_windows_give_the_ids_of_the_whole_text(tokenizer_type: str) -> None:
    tokenizer = make(tokenizer_type)
    text = long_text()
    assert len(text) > 7 * ENCODE_TOGETHER
    encoded = [token for ids in encode_long(tokenizer, parts_of(text)) for token in ids]
    assert differs_at(encoded, tokenizer(text)["input_ids"]) is None


@pytest.mark.parametrize("length", [0, 1, ENCODE_TOGETHER - 1, ENCODE_TOGETHER, ENCODE_TOGETHER + 1, 2 * ENCODE_TOGETHER])
@pytest.mark.parametrize("tokenizer_type", ["gpt2", "wordpiece"])
def test_lengths_around_a_window(tokenizer_type: str, length: int) -> None:
    tokenizer = make(tokenizer_type)
    text = long_text()[:length]
    encoded = [token for ids in encode_long(tokenizer, parts_of(text, 1000)) for token in ids]
    assert differs_at(encoded, tokenizer(text)["input_ids"]) is None


@pytest.mark.parametrize(("tokenizer_type", "packing"), [("gpt2", "documents"), ("llama3", "documents"), ("wordpiece", "none")])
def test_samples_of_a_long_file_are_those_of_its_text(tokenizer_type: str, packing: Any, tmp_path: Path) -> None:
    text = long_text()
    assert len(text.encode()) > LONG_BYTES
    (tmp_path / "a.txt").write_text(text)
    tokenizer = make(tokenizer_type)
    sequences, mask = make_sequences(tokenizer, DatasetSource(path=tmp_path / "a.txt").documents(), 512, None, packing)
    ids = tokenizer(text)["input_ids"]
    if packing == "none":
        assert sequences.tolist() == [ids[:512]]
    elif tokenizer_type == "llama3":
        assert sequences[:, 0].unique().tolist() == [1]
        assert differs_at(sequences[:, 1:].flatten().tolist(), ids[1:][: 511 * len(sequences)]) is None
    else:
        assert differs_at(sequences.flatten().tolist(), ids[: 512 * len(sequences)]) is None
    assert mask.all()


def test_one_endless_word_ends(tmp_path: Path) -> None:
    """No place to cut: the ids may differ, and nothing is lost."""
    text = "ab" * ENCODE_TOGETHER + "c" * ENCODE_TOGETHER
    tokenizer = make("gpt2")
    encoded = [token for ids in encode_long(tokenizer, parts_of(text)) for token in ids]
    assert tokenizer.decode(encoded, clean_up_tokenization_spaces=False) == text, "another text"


def test_no_more_is_read_than_is_asked_for(llama: Path) -> None:
    read: list[int] = []

    def parts() -> Iterator[str]:
        for number in range(10**6):
            read.append(number)
            yield "some words " * 5000

    ids = next(iter(part for part in encode_long(load_tokenizer(open_folder(llama).base), parts()) if len(part) > 10))
    assert len(ids) > 10_000
    assert len(read) < 20


PEAK = """
import sys, threading, time
from pathlib import Path
import psutil
from gradmap_pipeline.cli import main
peak, done = [0], False
def watch():
    process = psutil.Process()
    while not done:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
try:
    main()
finally:
    Path("peak").write_text(str(peak[0]))
"""


def run_measured(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], int]:
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, cwd=folder, check=False)
    return done, int((folder / "peak").read_text())


@pytest.mark.parametrize("options", ["samples: 8, sequence_length: 64", "samples: 8, sequence_length: 64, packing: none"])
def test_a_long_text_stays_within_the_memory(options: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    line = "The survey of 1884, a “first”, found 12 naïve readers; others said nothing at all.\n"
    with (tmp_path / "long.txt").open("w") as file:
        for _ in range(50_000_000 // len(line.encode()) + 1):
            file.write(line)
    samples = options.replace("8", "1", 1) if "none" in options else options
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nmodel: {{path: model}}\nsteps:\n  - use: calibrate\n    with: {{dataset: {{path: long.txt}}, {samples}}}\n"
        "  - use: evaluate\n    with: {dataset: {path: long.txt}, samples: 8, sequence_length: 64}\n"
    )
    done, peak = run_measured(tmp_path, "run", "r.yaml", "--memory", "700MiB", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert peak < 700 << 20, f"{peak / 2**20:.0f} MiB"
