"""The whole plugin surface: one hook."""

from __future__ import annotations

import pluggy

from .stage import Stage

hookspec = pluggy.HookspecMarker("gradmap")
hookimpl = pluggy.HookimplMarker("gradmap")
"""Decorator of the function `gradmap_stages()`, which returns the stage classes that a plugin provides."""


@hookspec
def gradmap_stages() -> list[type[Stage]]:  # type: ignore[empty-body]
    """Return the stage classes this plugin provides."""
