"""What tokenizer_config.json says of a tokenizer, in the words that programs built on transformers 4 know.

transformers 5 saves tokenizers as `TokenizersBackend`, which nothing older loads, and further special tokens as a list, at which
transformers 4 fails. It reads the older words alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .files import read_json

CONFIG = "tokenizer_config.json"
_NEWER, _OLDER = "TokenizersBackend", "PreTrainedTokenizerFast"
_INPUTS = ["input_ids", "attention_mask"]
"""The newer class gives a model these two. The older one adds `token_type_ids`, which decoders refuse, unless these are listed."""


def add_older_tokenizer(folder: Path, texts: tuple[str, ...]) -> None:
    """Rewrite the tokenizer_config.json of a folder, where tokenizer.json alone gives the ids of `texts` that transformers 5 gives.

    An older program then has the same: it reads tokenizer.json as it is.
    """
    content = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    older = with_older_words(content)
    if older != content and _reads_alone(folder, texts):
        (folder / CONFIG).write_text(json.dumps(older, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_older_words(content: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json with the older name of its class and of its further special tokens."""
    content = dict(content)
    if content.get("tokenizer_class") == _NEWER:
        content["tokenizer_class"] = _OLDER
        content.setdefault("model_input_names", _INPUTS)
    further = content.get("extra_special_tokens")
    if isinstance(further, list):
        del content["extra_special_tokens"]
        before = content.get("additional_special_tokens") or []
        content["additional_special_tokens"] = [*before, *(token for token in further if token not in before)]
    return content


def _reads_alone(folder: Path, texts: tuple[str, ...]) -> bool:
    from tokenizers import Tokenizer

    from .pretrained import load_tokenizer

    if not (folder / "tokenizer.json").is_file():
        return False
    try:
        loaded = load_tokenizer(folder)
    except ModelError:  # said when the copy is compared with the original
        return False
    alone = Tokenizer.from_file(str(folder / "tokenizer.json"))
    alone.no_padding()
    alone.no_truncation()
    return all(
        loaded(text, add_special_tokens=adding)["input_ids"] == alone.encode(text, add_special_tokens=adding).ids
        for text in texts
        for adding in (True, False)
    )
