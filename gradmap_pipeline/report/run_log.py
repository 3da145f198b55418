"""The runs of a store for people: a list, one run, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run.difference import Side, show_value
from ..run.run_files import DONE, MISSED, list_runs, read_head, shorten_ids
from ..text import format_seconds, shorten_titles
from .console import add_row, align, fits, make_console, make_table, print_table, say
from .summary_tables import print_models

if TYPE_CHECKING:
    from rich.console import Console

_WITHOUT_END = ("running", "killed", "damaged")
_MOST_METRICS = 1
"""Metrics of a run in the list."""
_LEAST_PART = 0.02
"""Of a step's time, that earlier runs took of it and that is worth a word."""


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
        depth, figure = _list_results(head)
        start, recipe = show_time(head.get("started_at")), str(head.get("recipe", ""))
        add_row(table, head["short_id"], start, recipe, *_list_end(head), depth, figure)
    if fits(console, table) or not console.is_terminal:
        print_table(console, table)
    else:
        _print_list(console, heads)
    if len(heads) < count:
        say(console, f"{len(heads)} of {count} runs; --limit 0 lists all, gradmap show RUN shows one")


def _print_list(console: Console, heads: list[dict[str, Any]]) -> None:
    """The same for a narrow terminal: a line for each run, and one for what it came to."""
    rows = [("run", "started", "ended", "took", "recipe")]
    for head in heads:
        start = show_time(head.get("started_at"))[len("2026-") : -len(":00")]
        rows.append((head["short_id"], start, *_list_end(head), _name_recipe(Path(str(head.get("recipe", ""))))))
    lines = align(rows, right=(3,))
    say(console, lines[0])
    for head, line in zip(heads, lines[1:], strict=True):
        say(console, line)
        depth, figure = _list_results(head)
        result = ", ".join(filter(None, (f"{depth} layers" if depth else "", figure)))
        if result:
            say(console, f"{' ' * (len(rows[1][0]) + 2)}{result}")


def _name_recipe(recipe: Path) -> str:
    """The name of the file; before that of an export, which is the same for all, its folder's."""
    return f"{recipe.parent.name}/{recipe.name}" if recipe.suffix == ".json" and recipe.parent.name else recipe.name


def _list_end(head: Mapping[str, Any]) -> tuple[str, str]:
    """How a run ended, and what it took."""
    outcome, code = head["outcome"], head.get("exit_code")
    return f"{outcome}{f' ({code})' if code else ''}", "" if outcome in _WITHOUT_END else format_seconds(head["seconds"])


def _list_results(head: Mapping[str, Any]) -> tuple[str, str]:
    """Layers and metrics that a run came to; of one that was stopped before its end, how far it had come."""
    if head["outcome"] not in (DONE, MISSED):
        return "", _show_progress(head)
    depth = f"{head['base_layers']} → {head['layers']}" if head.get("layers") is not None else ""
    metrics = head.get("metrics") or {}
    titles = shorten_titles(list(metrics))
    figures = [f"{title} {value:.4g}" for title, value in zip(titles, metrics.values(), strict=True)]
    more = [f"{len(figures) - _MOST_METRICS} more"] if len(figures) > _MOST_METRICS else []
    return depth, ", ".join([*figures[:_MOST_METRICS], *more])


def _show_progress(head: Mapping[str, Any]) -> str:
    """`of 7 steps, 2 done`, where that is known."""
    done, planned = head.get("steps_done"), head.get("steps")
    return f"of {planned} step{'' if planned == 1 else 's'}, {done} done" if isinstance(done, int) else ""


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
        say(console, line)
    models = record.get("models") or []
    if models:
        columns = list(dict.fromkeys(column for row in models for column in row["metrics"]))
        cells, figures = [], []
        for row in models:
            removed = sorted(set(models[0]["kept"]) - set(row["kept"]))
            cells.append([row["label"], row["step"], str(row["layers"]), f"{row['parameters']:,}", _join(removed)])
            figures.append([f"{row['metrics'][column]['value']:.4g}" if column in row["metrics"] else "" for column in columns])
        headings = ("model", "step", "layers", "parameters", "removed")
        print_models(console, headings, cells, columns, figures, [row["step"] for row in models])
    if record.get("steps"):
        plugins = {step["id"]: step["plugin"] for step in record["provenance"]["steps"]}
        others = set(plugins.values()) - {record["made_by"]}  # else the lines above name it
        table = make_table("step", "stage", "took", *(["plugin"] if others else []), "result", right=("took",))
        for step in record["steps"]:
            took = "from the store" if step["cached"] else _show_time_of(step)
            stage = "" if step["stage"] == step["id"] else step["stage"]
            add_row(table, step["id"], stage, took, *([plugins.get(step["id"], "")] if others else []), str(step["key"])[:12])
        print_table(console, table)
    for line in str(record["recipe"]).rstrip("\n").split("\n"):
        say(console, f"    {line}", is_quoted=True)


def _show_time_of(step: Mapping[str, Any]) -> str:
    """What a step took; where it went on from what an earlier run had finished, how much of that was this run's."""
    seconds, here = step["seconds"], step.get("seconds_here")
    told = format_seconds(seconds)
    is_split = here is not None and seconds - here >= max(1.0, _LEAST_PART * seconds)
    return f"{told}, {format_seconds(here)} of it in this run" if is_split else told


def _join(layers: list[int]) -> str:
    return ", ".join(map(str, layers))


def _describe(record: Mapping[str, Any]) -> Iterator[str]:
    head, provenance = record["head"], record.get("provenance") or {}
    code = f", exit code {head['exit_code']}" if head.get("exit_code") else ""
    progress = _show_progress(head) if head["outcome"] not in (DONE, MISSED) else ""
    yield f"run {head['id']} of {head['recipe']}: {head['outcome']}{code}{f'; {progress}' if progress else ''}"
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
