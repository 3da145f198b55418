"""What transformers says through its logger, for the user: as notes, each once, instead of lines on standard error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Listener(logging.Handler):
    def __init__(self, tell: Callable[[str], None], told: set[str]) -> None:
        super().__init__(logging.WARNING)
        self._tell, self._told = tell, told

    def emit(self, record: logging.LogRecord) -> None:
        text = f"transformers: {' '.join(record.getMessage().split())}"
        if text not in self._told:
            self._told.add(text)
            self._tell(text)


@contextmanager
def heard(tell: Callable[[str], None], told: set[str] | None = None) -> Iterator[None]:
    """Have `tell` called with each warning. `told`: those that are known already, and get known."""
    from transformers.utils import logging as theirs

    listener = _Listener(tell, set() if told is None else told)
    theirs.disable_default_handler()
    theirs.add_handler(listener)
    try:
        yield
    finally:
        theirs.remove_handler(listener)
        theirs.enable_default_handler()
