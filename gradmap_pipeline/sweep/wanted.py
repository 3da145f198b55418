"""Which hidden states a pass keeps once it has gone on from them, and what is said where some are missing."""

from __future__ import annotations

from collections.abc import Collection

from ..errors import PluginError

_KEEP_ALL = "open the sweep with keep='all', or say so in the stage's Measure"
_KEEP_UP = "a correction that goes up has left them; where it looks back, let its 'goes_up' be False"


class WantedBoundaries:
    """Positions of boundaries that stay."""

    def __init__(self, positions: Collection[int] | None) -> None:
        """None: all."""
        self.positions = positions

    def __contains__(self, position: int) -> bool:
        return self.positions is None or position in self.positions

    def explain(self, position: int, done: int) -> PluginError:
        """Why there is nothing at a position. `done`: layers whose outputs are known."""
        kept = f"are not kept: {_KEEP_UP if self.positions else _KEEP_ALL}"
        reason = kept if position <= done else "are not known yet: run the layers below it first"
        return PluginError(f"the hidden states before layer {position} {reason}")

    def check_all(self, use: str) -> None:
        """Raise `PluginError` unless all stay, which a use takes."""
        if self.positions is not None:
            raise PluginError(f"{use} from hidden states below it, which are not kept: {_KEEP_ALL}")
