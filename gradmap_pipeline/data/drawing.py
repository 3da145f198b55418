"""Draw samples from what a calibration set is made of: each part its share, mixed evenly."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import CapacityError, ModelError, StageError
from .calibration_set import CalibrationPart
from .documents import Chat, Document
from .generation import generate_rows
from .sequences import Packing, digest_sequences, draw_rows, stack_rows
from .tokenizer import count_embeddings, load_tokenizer

if TYPE_CHECKING:
    import torch

    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from .calibration_sources import CalibrationSource


def draw_samples(
    source: CalibrationSource,
    graph: ModelGraph,
    length: int,
    samples: int,
    packing: Packing,
    context: Context,
    *,
    shuffle: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, tuple[CalibrationPart, ...]]:
    """(input_ids, attention_mask), both int64 (samples, length), and what each part of a mix gave.

    Each part is drawn by itself, by the seed and its number. Their samples follow each other in turn, so that the first half of
    all samples holds half of each part. `length`: of a sequence; with packing `none`, the longest. Raises `StageError` with the
    part that cannot be read.
    """
    tokenizer, embeddings = load_tokenizer(graph.base), count_embeddings(graph.base)
    is_plain = bool(getattr(tokenizer, "chat_template", None))

    def watch(documents: Iterable[Document]) -> Iterator[Document]:
        nonlocal is_plain
        for document in documents:
            is_plain = is_plain and not isinstance(document, Chat)
            yield document

    places: list[tuple[float, int, array[int]]] = []
    parts: list[CalibrationPart] = []
    for number, (part, count) in enumerate(zip(source.parts(), source.share_out(samples), strict=True)):
        seed = context.seed + number
        try:
            if part.generated is not None:
                is_plain = False  # what the model writes itself is what it is used for
                rows = generate_rows(part.generated, graph, length, count, seed, context)
            else:
                drawn_by = seed if shuffle else None
                with context.progress("read and tokenise", 1, "data set") as advance:
                    rows = draw_rows(tokenizer, watch(part.documents(drawn_by)), length, count, packing, drawn_by, embeddings)
                    advance()
        except (StageError, ModelError, CapacityError) as error:
            if source.mix is None:
                raise
            raise type(error)(f"part {number + 1} of the mix ({part.name}): {error}") from error
        places += [((place + 0.5) / count, number, row) for place, row in enumerate(rows)]
        if source.mix is not None:
            digest = digest_sequences(*stack_rows(rows, tokenizer, embeddings))
            parts.append(CalibrationPart(samples=count, tokens=sum(map(len, rows)), sha256=digest))
            context.note(f"{count} samples, {parts[-1].tokens:,} tokens, of {part.name}")
    if is_plain:
        context.note(
            "the tokenizer has a chat template, and none of this text is a chat; a model that answers chats is better calibrated "
            "on some (`column: messages`)"
        )
    if source.mix is not None:
        places.sort(key=lambda place: place[:2])
    input_ids, mask = stack_rows([row for *_, row in places], tokenizer, embeddings)
    return input_ids, mask, tuple(parts)
