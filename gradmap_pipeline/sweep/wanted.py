"""Which hidden states a pass keeps once it has gone on from them, and what is said where some are missing."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import PluginError

_KEEP_ALL = "open the sweep with keep='all', or say so in the stage's Measure"
_KEEP_UP = "models that go up side by side have those at one layer alone; what looks at others says goes_up False"


class WantedBoundaries:
    """Positions of boundaries that stay."""

    def __init__(self, positions: Collection[int] | None) -> None:
        """None: all."""
        self.positions = positions

    def __contains__(self, position: int) -> bool:
        return self.positions is None or position in self.positions

    def explain(self, position: int, done: int) -> PluginError:
        """Why there is nothing at a position. `done`: layers whose outputs are known."""
        unknown = position > done and not self.positions
        reason = "are not known yet: run the layers below it first" if unknown else f"are not kept: {self._advice}"
        return PluginError(f"the hidden states before layer {position} {reason}")

    def check_all(self, use: str) -> None:
        """Raise `PluginError` unless all stay, which a use takes."""
        if self.positions is not None:
            raise PluginError(f"{use} from hidden states below it, which are not kept: {self._advice}")

    @property
    def _advice(self) -> str:
        return _KEEP_UP if self.positions else _KEEP_ALL
