"""Libraries that only some stages need, and how to get them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec


def explain_missing(modules: Sequence[str], extra: str) -> str | None:
    """How to install the modules that are not there; None where all are. Imports nothing."""
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return None
    return f"needs {' and '.join(missing)}, which is not installed: pip install 'gradmap-pipeline[{extra}]'"
