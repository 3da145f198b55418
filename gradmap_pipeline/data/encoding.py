"""Documents to token ids, in order, reading only as far as ids are used."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .documents import Chat, Document, LongText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODE_TOGETHER = 1 << 17
"""Characters tokenised at once; few enough that little is made without need."""
_OVERLAPS = (1 << 12, 1 << 14, 1 << 16)
"""Characters that two windows of a long text share, until their tokens agree."""


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> Iterator[Iterable[list[int]]]:
    """For each document its ids, in parts that follow each other. The caller takes all parts of one before the next document."""
    together: list[str] = []
    size = 0

    def flush() -> Iterator[list[list[int]]]:
        nonlocal size
        if together:
            for ids in tokenizer(together)["input_ids"]:
                yield [ids]
            together.clear()
            size = 0

    for document in documents:
        if isinstance(document, str) and len(document) < ENCODE_TOGETHER:
            together.append(document)
            size += len(document)
            if size >= ENCODE_TOGETHER:
                yield from flush()
            continue
        yield from flush()
        if isinstance(document, Chat):
            yield [tokenizer(document.render(tokenizer), add_special_tokens=False)["input_ids"]]  # the template has added them
        else:
            yield encode_long(tokenizer, document.parts() if isinstance(document, LongText) else iter([document]))
    yield from flush()


@dataclass
class _Window:
    """Tokens of a part of a text; places are counted in characters of the whole text."""

    lead: list[int]
    """Special tokens before the text."""
    ids: list[int]
    starts: list[int]
    ends: list[int]
    trail: list[int]
    """Special tokens after the text."""

    def first_from(self, place: int) -> int:
        """The first token that starts at a place or after it, and shares no character with the one before."""
        index = bisect_left(self.starts, place)
        while 0 < index < len(self.ids) and self.ends[index - 1] > self.starts[index]:
            index += 1
        return index

    def between(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Start, end and id of the tokens that start in a range."""
        inside = slice(bisect_left(self.starts, low), bisect_left(self.starts, high))
        return list(zip(self.starts[inside], self.ends[inside], self.ids[inside], strict=True))


def encode_long(tokenizer: PreTrainedTokenizerBase, parts: Iterator[str]) -> Iterator[list[int]]:
    """The ids of a text as if it were tokenised whole, window by window.

    Two neighbouring windows overlap. Where they agree on the tokens of the middle half of the overlap, neither sees that its text
    is cut, and the ids go on from one to the other. A text without such a place in 64 Ki characters (one endless word) is
    cut there. Tokenizers that do not say where their tokens stand take the text whole.
    """
    if not tokenizer.is_fast:
        yield tokenizer("".join(parts))["input_ids"]
        return
    text = _Buffer(parts)
    window = _tokenise(tokenizer, text.take(0, ENCODE_TOGETHER), 0)
    yield window.lead
    begin, end, done = 0, ENCODE_TOGETHER, 0  # the window's place, and the token from which its ids are still to be given
    while text.reaches(end):
        for overlap in _OVERLAPS:
            start = max(begin, end - overlap)
            following = _tokenise(tokenizer, text.take(start, start + ENCODE_TOGETHER), start)
            low, middle, high = (start + overlap * quarter // 4 for quarter in (1, 2, 3))
            shared = window.between(low, high)
            last, first = window.first_from(middle), following.first_from(middle)
            is_same = len(shared) > 1 and shared == following.between(low, high)
            if is_same and last < len(window.ids) and window.starts[last] < high and last >= done:
                break
        else:
            last, start = len(window.ids), end
            following, first = _tokenise(tokenizer, text.take(start, start + ENCODE_TOGETHER), start), 0
        yield window.ids[done:last]
        window, done, begin, end = following, first, start, start + ENCODE_TOGETHER
        text.forget(begin)
    yield window.ids[done:]
    yield window.trail


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, offset: int) -> _Window:
    told: Any = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    special, ids = told["special_tokens_mask"], told["input_ids"]
    begin = next((index for index, is_special in enumerate(special) if not is_special), len(ids))
    end = len(ids) - next((index for index, is_special in enumerate(reversed(special)) if not is_special), 0)
    spans = told["offset_mapping"][begin:end]
    starts, ends = [offset + start for start, _ in spans], [offset + stop for _, stop in spans]
    return _Window(ids[:begin], ids[begin:end], starts, ends, ids[max(begin, end) :])


class _Buffer:
    """A text that is read as far as it is used, and forgotten from the start."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts = parts
        self._held = ""
        self._start = 0

    def take(self, start: int, end: int) -> str:
        """The characters in a range, as far as the text goes."""
        self.reaches(end - 1)
        return self._held[start - self._start : end - self._start]

    def reaches(self, place: int) -> bool:
        """Whether the text has a character there."""
        taken, size = [self._held], len(self._held)
        while self._start + size <= place:
            part = next(self._parts, None)
            if part is None:
                break
            taken.append(part)
            size += len(part)
        self._held = "".join(taken)
        return self._start + size > place

    def forget(self, start: int) -> None:
        """Drop what is before a place."""
        self._held = self._held[start - self._start :]
        self._start = start
