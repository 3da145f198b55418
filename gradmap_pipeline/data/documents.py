"""What a data set consists of: texts, long texts read in parts, and chats."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StageError
from .readers import Row, describe, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONG_BYTES = 1 << 20
"""Size from which a text file is read in parts."""
_SHUFFLE_BUFFER = 1000  # documents
_DAY = "26 Jul 2024"  # what Llama 3.1's template takes where no day is given
_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIXED_DAY = (  # in front of templates that require the date, so that a recipe gives the same ids on every day
    "{%- macro strftime_now(form) -%}{{ '26 Jul 2024' if form == '%d %b %Y' else '2024-07-26' }}{%- endmacro -%}"
)


@dataclass(frozen=True)
class LongText:
    """The text of one file, read in parts anew by each reader."""

    file: Path

    def parts(self) -> Iterator[str]:
        """Text in parts that follow each other."""
        return read_text(self.file)


@dataclass(frozen=True)
class Chat:
    """Messages with roles, which a chat template turns into text."""

    messages: list[dict[str, Any]]
    place: str
    """The place where they stand, for messages."""

    def render(self, tokenizer: PreTrainedTokenizerBase, *, is_question: bool = False) -> str:
        """The text that the tokenizer's chat template makes, special tokens included. Raises `StageError`.

        `is_question`: end it where the answer of the assistant begins.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise StageError(
                f"{self.place}: found chat messages, and the tokenizer has no chat template to make text of them; "
                "put its chat_template.jinja beside the tokenizer, or set 'column' to one that holds text"
            )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, and none is the default
            raise StageError(f"{self.place}: the tokenizer has no default chat template ({error})") from error
        self._check_roles(template)
        try:
            template = _FIXED_DAY + template if "strftime_now" in template else template
            text = tokenizer.apply_chat_template(
                self.messages, chat_template=template, tokenize=False, date_string=_DAY, add_generation_prompt=is_question
            )
        except Exception as error:  # a template may fail in any way its author thought of
            raise StageError(f"{self.place}: the tokenizer's chat template refuses the messages ({error})") from error
        return str(text)

    def _check_roles(self, template: str) -> None:
        """Raise `StageError` for a role that no template has, or that this one does not name: many would print any word."""
        for number, turn in enumerate(self.messages, 1):
            role = turn["role"]
            if not isinstance(role, str) or not (role in _ROLES or f"'{role}'" in template or f'"{role}"' in template):
                accepted = f"{', '.join(_ROLES)}, and roles that the tokenizer's chat template names"
                found = repr(role) if isinstance(role, str) else describe(role)
                raise StageError(f"{self.place}: message {number} has the role {found}; accepted: {accepted}")


Document = str | LongText | Chat


def make_documents(rows: Iterable[Row]) -> Iterator[Document]:
    """Texts and chats of a column; empty ones and null are left out. Raises `StageError` for anything else."""
    for row in rows:
        value = row.value
        if isinstance(value, str):
            if not is_text(value):
                raise StageError(f"{row.place}: the text holds half of a surrogate pair, which is not a character; remove it")
            if value.strip():
                yield value
        elif _is_chat(value):
            if value:
                yield Chat(value, row.place)
        elif value is not None:
            advice = "set 'column' to one that holds text, or chat messages: a list of {role: …, content: …}"
            raise StageError(f"{row.place}: found {describe(value)}, where text is wanted; {advice}")


def is_text(value: str) -> bool:
    """Whether every character of a string is one, and no half of a surrogate pair."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def shuffle_documents(documents: Iterable[Document], seed: int) -> Iterator[Document]:
    """Draw from a buffer of 1000 documents."""
    source = random.Random(seed)
    held: list[Document] = []
    for document in documents:
        if len(held) < _SHUFFLE_BUFFER:
            held.append(document)
            continue
        place = source.randrange(_SHUFFLE_BUFFER)
        yield held[place]
        held[place] = document
    source.shuffle(held)
    yield from held


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value)
