"""What differs between two runs, recipes or exports: options, data, versions, decisions and metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CommandError
from ..text import name_without_place
from .run_files import find_run, is_run_name, read_run

if TYPE_CHECKING:
    from ..recipe.plan import Plan

Values = dict[str, Any]
"""By name, a value that stands for itself: a number, a text, a list of such."""
PARTS = ("options", "data", "versions", "decisions", "metrics", "result", "end")
_BY_STEP = ("options", "data", "versions")
"""Parts whose values are of steps."""
_OF_COMPUTING = ("device", "threads")
"""Not known of a run that took all from the store."""
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


@dataclass(frozen=True)
class Side:
    """One of two things that are compared."""

    name: str
    """A name for people."""
    parts: dict[str, Values] = field(default_factory=dict)
    """Values by part; a part that it does not have, as a recipe has no metrics, is not compared."""
    steps: frozenset[str] | None = None
    """Ids of the steps that are known, where these are not all: those that led to an export."""


def find_differences(one: Side, other: Side) -> dict[str, dict[str, tuple[Any, Any]]]:
    """By part and name, both values; None where there is none. Parts that only one has are left out."""
    differing: dict[str, dict[str, tuple[Any, Any]]] = {}
    have_metrics = "metrics" in one.parts and "metrics" in other.parts
    for part in PARTS:
        if part in one.parts and part in other.parts and not (part == "result" and have_metrics):
            before, after = one.parts[part], other.parts[part]
            names = list(dict.fromkeys([*before, *after]))
            if part in _BY_STEP:
                names = [name for name in names if _is_known(name, one) and _is_known(name, other)]
            pairs = {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}
            pairs = {name: pair for name, pair in pairs.items() if not (name in _OF_COMPUTING and None in pair)}
            if pairs:
                differing[part] = pairs
    return differing


def _is_known(name: str, side: Side) -> bool:
    """Whether a side says anything of a value: an export has the steps that led to it, without their wiring."""
    if side.steps is None:
        return True
    step, _, option = name.removeprefix("plugin of ").removeprefix("code of ").removeprefix("Python of ").partition(".")
    is_of_step = bool(option) or step != name or step == "steps"
    is_known = step in side.steps or step == "model"
    return not is_of_step or (is_known and not option.startswith("from.") and option != "to")


def side_of_run(record: Mapping[str, Any]) -> Side:
    """A run, by its record."""
    head, provenance = record["head"], record.get("provenance") or {}
    options = _list_options(record.get("model") or {}, record.get("planned") or ())
    parts = {"options": options, "end": {"outcome": head["outcome"], "failure": record.get("failure", "")}}
    if provenance:
        parts["options"]["seed"] = provenance.get("seed")
        parts["data"] = _list_data(provenance)
        parts["versions"] = _list_versions(provenance)
        parts["decisions"] = _list_decisions(record)
        parts["metrics"] = {
            f"{row['label']} ({row['step']}): {column}": metric["value"]
            for row in record.get("models") or ()
            for column, metric in row["metrics"].items()
        }
        parts["result"] = _list_result(record)
    return Side(f"{head['id'][:6]} {head['recipe']}, {head['started_at']}", parts)


def side_of_plan(plan: Plan) -> Side:
    """A recipe, as it is planned."""
    steps = [
        {"id": one.id, "stage": one.stage.name, "options": one.stage.model_dump(mode="json", by_alias=True)} for one in plan.steps
    ]
    wiring = {one.id: {name: ".".join(source) for name, source in one.inputs.items()} for one in plan.steps}
    planned = [{**step, "inputs": wiring[str(step["id"])]} for step in steps]
    options = _list_options(plan.model.model_dump(mode="json", exclude_none=True), planned)
    return Side(str(plan.recipe_path), {"options": {**options, "seed": plan.seed}})


def side_of_export(lineage: Mapping[str, Any], folder: Path) -> Side:
    """An export, by its lineage. Only the steps that led to it are known."""
    provenance = lineage.get("provenance") or {}
    steps = [{**step, "inputs": {}} for step in lineage.get("steps") or ()]
    options = _list_options((lineage.get("recipe") or {}).get("model") or {}, steps)
    result: Values = {"layers removed": list(lineage["layers_removed"]), "tensors changed": len(lineage["patched"])}
    result |= {_name_metric(one): one["value"] for one in lineage["metrics"]}
    parts = {"options": options, "result": result}
    if provenance:
        parts |= {"data": _list_data(provenance), "versions": _list_versions(provenance)}
        parts["options"]["seed"] = provenance.get("seed")
    return Side(str(folder), parts, frozenset(step["id"] for step in steps))


def _list_result(record: Mapping[str, Any]) -> Values:
    """What the last model of a run is, and what was measured of it."""
    models = record["models"]
    removed = sorted(set(models[0]["kept"]) - set(models[-1]["kept"]))
    last = [row for row in models if row["kept"] == models[-1]["kept"] and row["patched"] == models[-1]["patched"]]
    metrics = {_name_metric(metric): metric["value"] for row in last for metric in row["metrics"].values()}
    return {"layers removed": removed, "tensors changed": models[-1]["patched"], **metrics}


def _name_metric(metric: Mapping[str, Any]) -> str:
    return f"{metric['name']} on {name_without_place(metric['on'])}" if metric["on"] else str(metric["name"])


def read_side(name: str, store: Path, plugins: Sequence[Path]) -> Side:
    """What an argument of the command line names: a recipe file, an export, or a run of the store.

    Raises `CommandError` where it is none of these, `RecipeError` where a recipe cannot be planned.
    """
    path = Path(name)
    if path.exists():
        return _read_path(path, store, plugins)
    if not is_run_name(name):
        advice = "name a recipe file, an export, or a run as gradmap log shows it"
        raise CommandError(f"{name!r} is neither a file nor the name of a run; {advice}")
    return side_of_run(load_run(store, name))


def load_run(store: Path, name: str) -> dict[str, Any]:
    """The record of the run that a text names. Raises `CommandError` where there is none as it was written."""
    run = find_run(store, name)
    record = read_run(run)
    if record is None:
        raise CommandError(f"{str(run.path)!r} is damaged: it is not what was written when the run ended; name another run")
    return record


def _read_path(path: Path, store: Path, plugins: Sequence[Path]) -> Side:
    from ..artifacts import LINEAGE

    folder = path if path.is_dir() else path.parent if path.name == LINEAGE else None
    if folder is not None:
        from ..export.verify import read_lineage

        lineage = read_lineage(folder)
        try:
            return side_of_export(lineage, folder)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CommandError(f"{str(folder)!r} is an export of another form than this version knows; name another") from error
    from ..recipe.catalog import load_catalog
    from ..recipe.plan import make_plan
    from ..recipe.recipe import load_recipe

    return side_of_plan(make_plan(load_recipe(path), load_catalog(plugins), store))


def _list_options(model: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> Values:
    options = _flatten(model, "model")
    for step in steps:
        options[f"{step['id']}.use"] = step["stage"]
        options |= _flatten(step["options"], step["id"])
        options |= {f"{step['id']}.from.{name}": source for name, source in step["inputs"].items()}
    if steps:
        options["steps"] = [step["id"] for step in steps]
    return options


def _list_data(provenance: Mapping[str, Any]) -> Values:
    """Digests of the model and of data."""
    data: Values = {"model": provenance.get("model", {}).get("sha256")}
    for step in provenance.get("steps") or ():
        leaves = _flatten(step["options"], step["id"])
        data |= {name: value for name, value in leaves.items() if _is_content(value)}
    return data


def _list_versions(provenance: Mapping[str, Any]) -> Values:
    versions: Values = {"made by": provenance.get("made_by"), "python": provenance.get("python"), **provenance["libraries"]}
    versions |= {name: provenance.get(name) for name in ("device", "dtype", "threads")}
    for step in provenance.get("steps") or ():
        versions[f"plugin of {step['id']}"] = step["plugin"]
        versions[f"code of {step['id']}"] = step["code"]
        versions |= _flatten(step.get("python") or {}, f"Python of {step['id']}")
    return versions


def _list_decisions(record: Mapping[str, Any]) -> Values:
    decisions: Values = {}
    for step in record.get("steps") or ():
        for output in step["outputs"].values():
            ranked = output.get("decisions") if isinstance(output, dict) else None
            if isinstance(ranked, list):
                decisions[f"{step['id']}: least important first"] = [one.get("removed") for one in ranked]
    models = record.get("models") or []
    for row in models[1:]:
        removed = sorted(set(models[0]["kept"]) - set(row["kept"]))
        decisions[f"{row['step']}: layers removed"] = removed
        decisions[f"{row['step']}: tensors changed"] = row["patched"]
        decisions[f"{row['step']}: parameters"] = row["parameters"]
    return decisions


def _flatten(value: Any, name: str) -> Values:
    """Values by dotted name. What is not set is left out."""
    if isinstance(value, Mapping):
        return {inner: leaf for key, item in value.items() for inner, leaf in _flatten(item, f"{name}.{key}").items()}
    return {} if value is None else {name: value}


def _is_content(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and _DIGEST.fullmatch(item) for item in items)


def show_value(value: Any) -> str:
    """A value for people: digests cut short."""
    if value is None:
        return "not given"
    if isinstance(value, list):
        return f"[{', '.join(map(show_value, value))}]"
    if isinstance(value, str):
        return value[:12] if _DIGEST.fullmatch(value) else value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
