"""Whether the tokenizer of an exported folder is that of the model it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, StageError
from .companions import find_tokenizer_files
from .pretrained import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "naïve café Ünïcödé",
    "e\u0301 \u1e9e \ufb01 \u212b",  # combined characters, which normalisation may change
    "日本語のテスト、中文測試。한국어",
    "नमस्ते مرحبا שלום",
    "👍🏽 🏳️‍🌈 \U0001f600",
    " two  spaces\n\n\ttab\r\n    four ",
    "def f(x):\n    return x ** 2  # 3.14159\n",
    "1234567890 €£",
    "\u200b\ufeff\x00",
    "",
)


def check_tokenizer_copy(base: Path, folder: Path) -> None:
    """Raise `StageError` unless the tokenizer in `folder` gives what that in `base` gives, if that has one."""
    if not find_tokenizer_files(base):
        return
    try:
        original = load_tokenizer(base)
    except ModelError:  # inspected before the run; the transformers of another Python, which some stages run in, may be too old
        return
    try:
        exported = load_tokenizer(folder)
    except ModelError as error:
        raise StageError(f"the tokenizer cannot be exported: {error}; nothing was written") from error
    difference = next(_differences(original, exported), None)
    if difference is not None:
        raise StageError(f"the exported tokenizer is not that of {str(base)!r}: {difference}; nothing was written")


def _differences(original: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase) -> Iterator[str]:
    """What differs, one line each. A chat template is rendered from its text and the special tokens alone."""
    for said, read in (
        ("its class", lambda tokenizer: type(tokenizer).__name__),
        ("its special tokens", lambda tokenizer: tokenizer.special_tokens_map),
        ("the number of its tokens", len),
        ("its chat templates", lambda tokenizer: tokenizer.chat_template),
    ):
        ours, theirs = read(original), read(exported)
        if ours != theirs:
            yield f"{said}: {_shorten(theirs)} instead of {_shorten(ours)}"
    special = " ".join(original.all_special_tokens)
    for text in (*TEXTS, special, f"{special} mixed {special}"):
        for adds_special in (True, False):
            ids = [_encode(tokenizer, text, adds_special) for tokenizer in (original, exported)]
            if ids[0] != ids[1]:
                yield f"{_shorten(text)} becomes {_shorten(ids[1])} instead of {_shorten(ids[0])}"
        for skipping in (True, False):
            texts = [tokenizer.decode(ids[0], skip_special_tokens=skipping) for tokenizer in (original, exported)]
            if texts[0] != texts[1]:
                yield f"{_shorten(ids[0])} is decoded to {_shorten(texts[1])} instead of {_shorten(texts[0])}"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, adds_special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=adds_special)["input_ids"]
    return ids


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
