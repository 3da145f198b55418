"""Which architectures cannot be run one layer at a time, and whose error it is when one of them fails."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import TYPE_CHECKING

from ..errors import ModelError, first_line
from ..machine.shortages import is_shortage

if TYPE_CHECKING:
    from torch import nn

_UNFORESEEN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)
"""What an architecture raises that does not run one layer at a time."""

_PACKAGE = __name__.partition(".")[0]
_CALLERS = (f"{__package__}.layerwise", __name__, "contextlib")
"""Modules whose frames lead to the call that failed."""


@contextmanager
def refusing(module: nn.Module) -> Iterator[None]:
    """Refuse the architecture where its code fails, unless memory runs out or the error rises in code of ours that it calls."""
    try:
        yield
    except _UNFORESEEN as error:
        if is_shortage(error) or rises_in_ours(error):
            raise
        raise refuse(module, f"{type(error).__name__}: {first_line(error)}") from error


def refuse(module: nn.Module, reason: str) -> ModelError:
    """The error that says why a model cannot be run one layer at a time."""
    return ModelError(f"{type(module).__name__} cannot be run layer by layer: {reason}")


def rises_in_ours(error: BaseException) -> bool:
    """Whether the innermost code behind a failed call, other libraries apart, is of this package and not of transformers.

    An error at the call itself, as of arguments that the architecture does not take, is not ours.
    """
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    behind = dropwhile(lambda module: module in _CALLERS, modules)
    tops = [top for top in (module.partition(".")[0] for module in behind) if top in (_PACKAGE, "transformers")]
    return bool(tops) and tops[-1] == _PACKAGE
