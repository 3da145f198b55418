"""Libraries that only some stages need, and how to get them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec

OURS = "gradmap-pipeline"


def explain_missing(modules: Sequence[str], extra: str, distribution: str = OURS) -> str | None:
    """How to install the modules that are not there; None where all are. Imports nothing but packages around them.

    `distribution`: the one whose extra has them, unless only this package has such an extra.
    Without an extra, the distributions of the modules are left to the reader.
    """
    missing = [module for module in modules if not _is_there(module)]
    if not missing:
        return None
    if _has_extra(OURS, extra) and not _has_extra(distribution, extra):
        distribution = OURS
    advice = f"pip install '{distribution}[{extra}]'" if extra else f"{distribution} names no extra that has it"
    return f"needs {' and '.join(missing)}, which is not installed: {advice}"


def _has_extra(distribution: str, extra: str) -> bool:
    with suppress(PackageNotFoundError):
        return extra in (metadata(distribution).get_all("Provides-Extra") or ())
    return False


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it is missing
        return False
