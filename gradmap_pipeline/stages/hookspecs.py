"""The whole plugin surface: one hook."""

from __future__ import annotations

import pluggy

from .stage import Stage

hookspec = pluggy.HookspecMarker("gradmap")
hookimpl = pluggy.HookimplMarker("gradmap")


@hookspec
def gradmap_stages() -> list[type[Stage]]:  # type: ignore[empty-body]
    """Return the stage classes this plugin provides."""
