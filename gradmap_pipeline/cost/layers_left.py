"""Count the layers that a correction reaches, before anything runs: exactly where a plan knows which layers are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayersLeft:
    """The layers that a removal leaves of a model."""

    whole: Sequence[int]
    """Layers of the whole model, in order."""
    count: int
    """Number of layers that are left."""
    kept: Sequence[int] | None = None
    """The layers that are left. None stands for layers that are not known yet: then counts are the most that there can be."""

    @property
    def removed(self) -> int:
        """Return the number of layers that are removed."""
        return len(self.whole) - self.count

    def count_drifting(self) -> int:
        """Count the layers from the first removal up, and the one right below it."""
        return self._count(lambda layer, gone: layer + 1 >= min(gone, default=len(self.whole)), self.count)

    def count_before_cuts(self) -> int:
        """Count the layers right below removed ones."""
        return self._count(lambda layer, gone: layer + 1 in gone, min(self.removed, self.count))

    def count_next_to_cuts(self) -> int:
        """Count the layers right below and right above removed ones."""
        return self._count(lambda layer, gone: bool({layer - 1, layer + 1} & gone), min(2 * self.removed, self.count))

    def _count(self, is_reached: Callable[[int, set[int]], bool], most: int) -> int:
        if self.kept is None:
            return most
        gone = set(self.whole) - set(self.kept)
        return sum(is_reached(layer, gone) for layer in self.kept)
