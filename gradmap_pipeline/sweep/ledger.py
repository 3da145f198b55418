"""What a sweep holds in memory, booked by what it is for, under the names that its memory plan has.

Activations are autograd's, and what is read ahead is the loader's: these two lines are planned and not booked.

The plan says before the work what each line may take; the ledger says what it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Line = Literal[
    "embeddings and head",
    "layer weights",
    "read ahead",
    "hidden states",
    "gradients",
    "layer arguments",
    "activations",
    "logits",
    "weight gradients",
]
"""What memory is for. `activations`: what a layer computes and autograd saves. `layer arguments`: masks, position embeddings."""


class Ledger:
    """Bytes held now, and the most ever held, by line."""

    def __init__(self) -> None:
        self.held: dict[Line, int] = {}
        self.peaks: dict[Line, int] = {}

    def add(self, line: Line, size: int) -> None:
        """Book bytes; fewer than none where they are given back."""
        self.held[line] = self.held.get(line, 0) + size
        self.peaks[line] = max(self.peaks.get(line, 0), self.held[line])

    @contextmanager
    def holding(self, line: Line, size: int) -> Iterator[None]:
        """Book bytes for the time of the `with` block."""
        self.add(line, size)
        try:
            yield
        finally:
            self.add(line, -size)
