"""How a step that does not fit its memory says so: why, what else helps, and how much would be enough."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from ..errors import CapacityError, text_of

_LATER_BYTES = 128 << 20
"""What the program may hold besides when it comes to it: a tokenizer, text, what earlier steps leave."""


def lack_of_memory(
    reason: str, enough: int, ways: Sequence[str] = (), *, dtype: str = "", by_option: Mapping[str, str] | None = None
) -> CapacityError:
    """The error to raise. `enough`: bytes that suffice now, the program itself included; some more are advised.

    `ways`: what helps besides. `dtype`: the type that is computed in; a narrower one is advised where there is one. `by_option`:
    what helps where the stage that runs has an option of this name.
    """
    enough += _LATER_BYTES
    narrower = ["use --dtype bfloat16"] if dtype == "float32" else []
    error = CapacityError(f"{reason}; {_join([*narrower, *ways, f'allow {round_up(enough)} or more with --memory'])}")
    error.enough = enough
    error.by_option = dict(by_option or {})
    return error


def tell_shortage(error: CapacityError, options: Collection[str]) -> str:
    """What an error says to who can set these options of the stage that ran."""
    reason, parted, advice = text_of(error).rpartition("; ")
    ways = [way for option, way in error.by_option.items() if option in options]
    if not ways or not parted:
        return text_of(error)
    return f"{reason}; {', '.join(ways)}{', ' if ', or ' in advice else ', or '}{advice}"


def round_up(size: int) -> str:
    """A size as `--memory` takes it, of two digits, and no smaller: `0.47GiB`, `12GiB`, `130MiB`."""
    unit, name = (1 << 30, "GiB") if size >= 1 << 28 else (1 << 20, "MiB")
    digits = 1 - math.floor(math.log10(max(size, 1 << 20) / unit))
    if digits <= 0:
        step = 10**-digits
        return f"{math.ceil(size / unit / step) * step}{name}"
    return f"{math.ceil(size / unit * 10**digits) / 10**digits:.{digits}f}{name}"


def _join(ways: Sequence[str]) -> str:
    *others, last = ways
    return f"{', '.join(others)}, or {last}" if others else last
