"""What a store holds, and what was removed from it, as lines and as JSON. Plain text: a table of a thousand rows prints at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.store_entries import Entry, Total, add_up
from ..text import format_bytes, show
from .console import align

if TYPE_CHECKING:
    from ..run.store_check import Finding
    from ..run.store_collection import Collection

_KEY_DIGITS = 12
_RECIPES_SHOWN = 3
_SORTS = {
    "step": "result",
    "unit": "unit of work",
    "record": "record of a run",
    "environment": "environment",
    "other": "other file",
}


def format_entries(entries: Sequence[Entry]) -> list[str]:
    """A line for each finished step, and one for all units of a stage; what was used last first."""
    rows = [("stage", "key", "size", "last used", "used by")]
    rows += [
        (entry.name, entry.key[:_KEY_DIGITS], format_size_of(entry.bytes), format_time(entry.used_at), _name_recipes(entry.recipes))
        for entry in entries
        if entry.sort == "step"
    ]
    rows += [
        (total.name, f"{total.count} unit{'' if total.count == 1 else 's'}", *_show_total(total), "finished work of longer steps")
        for total in add_up(entry for entry in entries if entry.sort == "unit")
    ]
    records = [entry for entry in entries if entry.sort == "record"]
    if records:
        (total,) = add_up(records)
        rows.append(("records of runs", str(total.count), *_show_total(total), ""))
    return align(rows, right=(2,)) if len(rows) > 1 else ["the store holds no results"]


def _show_total(total: Total) -> tuple[str, str]:
    return format_size_of(total.bytes), format_time(total.used_at)


def format_totals(totals: Sequence[Total]) -> list[str]:
    """Bytes by stage, of everything else, and of all together."""
    rows = [("what", "number", "size")]
    rows += [(_name_total(total), str(total.count), format_size_of(total.bytes)) for total in totals]
    rows.append(("all", "", format_size_of(sum(total.bytes for total in totals))))
    return align(rows, right=(1, 2))


def _name_total(total: Total) -> str:
    plural = {"step": "results of", "unit": "units of work of", "record": "records of runs", "environment": "environments"}
    return " ".join(filter(None, (plural.get(total.sort, "other files"), total.name)))


def format_collection(done: Collection, *, is_dry: bool) -> list[str]:
    """A line for each thing removed or left, and what that comes to."""
    verb = "would remove" if is_dry else "removed"
    lines = [f"{verb} {name_entry(entry)}, last used {format_time(entry.used_at)}" for entry in done.removed]
    lines += [f"left {name_entry(entry)}: a run under way uses it" for entry in done.left]
    freed = format_size_of(sum(entry.bytes for entry in done.removed))
    stays = format_size_of(done.kept_bytes)
    lines.append(f"{verb} {len(done.removed)} of what the store keeps, {freed}; {stays} {'would stay' if is_dry else 'stay'}")
    return lines


def format_findings(looked_at: int, findings: Sequence[Finding]) -> list[str]:
    """What cannot be looked at or rests on something that has changed elsewhere, and what all that comes to."""
    lines = [f"note: {name_entry(finding.entry)}: {finding.reason}" for finding in findings if not finding.is_damage]
    damaged = len({finding.entry.path for finding in findings if finding.is_damage})
    lines.append(f"{looked_at} results, units and records looked at, {damaged} damaged")
    return lines


def name_entry(entry: Entry) -> str:
    """`result evaluate 3f2a90cc11d0 (12.3 MB)`."""
    key = f" {entry.key[:_KEY_DIGITS]}" if entry.key else ""
    return show(f"{_SORTS[entry.sort]} {entry.name}{key} ({format_size_of(entry.bytes)})")


def entries_as_json(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every entry, units one by one."""
    return [
        {
            "sort": entry.sort,
            "name": entry.name,
            "key": entry.key,
            "path": str(entry.path),
            "bytes": entry.bytes,
            "used_at": datetime.fromtimestamp(entry.used_at).astimezone().isoformat(timespec="seconds"),
            "recipes": list(entry.recipes),
        }
        for entry in entries
    ]


def totals_as_json(totals: Sequence[Total]) -> dict[str, Any]:
    """Bytes of all, and by sort and name."""
    parts = [{"sort": one.sort, "name": one.name, "count": one.count, "bytes": one.bytes} for one in totals]
    return {"bytes": sum(one.bytes for one in totals), "parts": parts}


def format_size_of(size: int) -> str:
    """`1.2 GB`; `0 kB` of nothing."""
    return format_bytes(size) or "0 kB"


def format_time(seconds: float) -> str:
    """Of the clock on the wall: `2026-11-27 11:40`."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _name_recipes(recipes: Sequence[str]) -> str:
    names = [Path(recipe).name for recipe in recipes]
    more = f" and {len(names) - _RECIPES_SHOWN} more" if len(names) > _RECIPES_SHOWN else ""
    return ", ".join(names[:_RECIPES_SHOWN]) + more
