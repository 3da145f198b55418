"""The runs of a store for people: a list, one run, and what differs between two."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..run.difference import Side, show_value
from ..run.run_files import list_runs, read_head, shorten_ids
from ..text import add_row, format_seconds, make_console, make_table, say, shorten_titles

_WITHOUT_END = ("running", "killed", "damaged")
_MOST_METRICS = 1
"""Metrics of a run in the list."""


def list_heads(store: Path, limit: int, recipe: str | None = None) -> tuple[list[dict[str, Any]], int]:
    """The heads of the newest records, and how many records there are. `limit` 0: all. `recipe`: of this recipe alone.

    A record that is not as it was written has its id alone.
    """
    runs = list_runs(store)
    short = shorten_ids(runs)
    place = None if recipe is None else str(Path(recipe).resolve())
    heads: list[dict[str, Any]] = []
    for run in runs:
        if limit and len(heads) >= limit:
            break
        head = read_head(run) or {"id": run.id, "outcome": "damaged"}
        if place is None or place == head.get("recipe_path"):
            heads.append({"short_id": short[run.id], **head})
    return heads, len(runs)


def print_log(heads: list[dict[str, Any]], count: int, store: Path) -> None:
    """A line for each run, newest first."""
    console = make_console()
    if not heads:
        say(console, f"no runs in {store}" if not count else f"no such runs among the {count} in {store}")
        return
    table = make_table("run", "started", "recipe", "ended", "took", "layers", "figure", right=("took", "layers"))
    for head in heads:
        add_row(table, head["short_id"], *_list_cells(head))
    console.print(table)
    if len(heads) < count:
        say(console, f"{len(heads)} of {count} runs; --limit 0 lists all, gradmap show RUN shows one")


def _list_cells(head: Mapping[str, Any]) -> Iterator[str]:
    yield show_time(head.get("started_at"))
    yield str(head.get("recipe", ""))
    code = head.get("exit_code")
    yield f"{head['outcome']}{f' ({code})' if code else ''}"
    yield format_seconds(head["seconds"]) if head["outcome"] not in _WITHOUT_END else ""
    yield f"{head['base_layers']} → {head['layers']}" if head.get("layers") is not None else ""
    metrics = list((head.get("metrics") or {}).items())
    more = f", {len(metrics) - _MOST_METRICS} more" if len(metrics) > _MOST_METRICS else ""
    yield ", ".join(f"{name} {value:.4g}" for name, value in metrics[:_MOST_METRICS]) + more


def show_time(written: Any) -> str:
    """A time in UTC, as records have it, in the time of this machine."""
    try:
        return datetime.fromisoformat(str(written).replace("Z", "+00:00")).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return ""


def print_run(record: Mapping[str, Any]) -> None:
    """One run: how it ended, what it was of, what it decided and measured, what each step took, and its recipe."""
    console = make_console()
    for line in _describe(record):
        for part in textwrap.wrap(line, console.width, subsequent_indent="  ") if console.is_terminal else [line]:
            say(console, part)
    models = record.get("models") or []
    if models:
        columns = list(dict.fromkeys(column for row in models for column in row["metrics"]))
        right = ("layers", "parameters", *shorten_titles(columns))
        table = make_table("model", "step", *right[:2], "removed", *right[2:], right=right)
        for row in models:
            removed = sorted(set(models[0]["kept"]) - set(row["kept"]))
            figures = [f"{row['metrics'][column]['value']:.4g}" if column in row["metrics"] else "" for column in columns]
            add_row(table, row["label"], row["step"], str(row["layers"]), f"{row['parameters']:,}", _join(removed), *figures)
        console.print(table)
    if record.get("steps"):
        plugins = {step["id"]: step["plugin"] for step in record["provenance"]["steps"]}
        others = set(plugins.values()) - {record["made_by"]}  # else the lines above name it
        table = make_table("step", "stage", "took", *(["plugin"] if others else []), "result", right=("took",))
        for step in record["steps"]:
            took = "from the store" if step["cached"] else format_seconds(step["seconds"])
            stage = "" if step["stage"] == step["id"] else step["stage"]
            add_row(table, step["id"], stage, took, *([plugins.get(step["id"], "")] if others else []), str(step["key"])[:12])
        console.print(table)
    for line in str(record["recipe"]).rstrip("\n").split("\n"):
        say(console, f"    {line}")


def _join(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _describe(record: Mapping[str, Any]) -> Iterator[str]:
    head, provenance = record["head"], record.get("provenance") or {}
    code = f", exit code {head['exit_code']}" if head.get("exit_code") else ""
    yield f"run {head['id']} of {head['recipe']}: {head['outcome']}{code}"
    if record.get("failure"):
        yield from (f"  {line}" for line in str(record["failure"]).split("\n"))
    took = "" if head["outcome"] in _WITHOUT_END else f", took {format_seconds(head['seconds'])}"
    yield f"started {show_time(head['started_at'])}{took}"
    if head.get("description"):
        yield str(head["description"]).strip().replace("\n", " ")
    if record.get("overrides"):
        yield f"set on the command line: {', '.join(record['overrides'])}"
    model = provenance.get("model") or {}
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    digest = f", sha256 {model['sha256'][:12]}" if model else ""
    yield f"model {head['model']}{revision}{digest}"
    yield "where: " + ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    if record.get("versions"):
        yield f"{record['made_by']}; " + ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def print_difference(one: Side, other: Side, differing: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> None:
    """By part, a line for each value that differs."""
    console = make_console()
    say(console, f"- {one.name}")
    say(console, f"+ {other.name}")
    if not differing:
        say(console, "no differences")
    for part, pairs in differing.items():
        say(console, part)
        for name, (before, after) in pairs.items():
            say(console, f"  {name}: {show_value(before)} → {show_value(after)}{_show_change(before, after)}")


def _show_change(before: Any, after: Any) -> str:
    if not (isinstance(before, float) and isinstance(after, float)) or not before:
        return ""
    return f" ({after / before - 1:+.1%})"
