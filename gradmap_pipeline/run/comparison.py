"""Several recipes, or one over a grid of options, through one store: what each comes to."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.model import Model
from ..errors import CommandError, GradmapError, OptionError, Problem, RecipeError, StageError
from ..export.exports import Export
from ..machine.machine import Machine
from ..metrics import Metric
from ..recipe.catalog import Catalog
from ..recipe.places import Place, find_model_places, find_read_places
from ..recipe.plan import Plan, make_plan
from ..recipe.recipe import MODEL_STEP, load_recipe
from ..recipe.yaml_positions import load_yaml
from ..stages.targets import check_target, find_clashing_export, find_foreign_files
from ..work import Work
from .events import Reporter
from .measured import name_columns
from .runner import RunState, run_plan
from .store import Store


@dataclass(frozen=True)
class Variant:
    """One recipe with its options."""

    name: str
    plan: Plan
    left_out: tuple[str, ...] = ()
    """Steps that write outside the store, where variants would write over each other, and those that take from them."""


@dataclass(frozen=True)
class Row:
    """What one variant comes to: its last model that was measured."""

    name: str
    label: str
    """What was done to the model last."""
    layers: int
    parameters: int
    bytes: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Metrics by column, as `name_columns` names them: `perplexity on text`."""
    seconds: float = 0.0
    """Seconds of the steps that led to the model, when they were computed."""
    layer_evaluations: float | None = None
    """Passes of all samples through one layer, forward or backward, that those steps report."""


def make_variants(
    recipes: Sequence[Path], grids: Sequence[str], overrides: Sequence[str], catalog: Catalog, store: Path
) -> list[Variant]:
    """Plan everything before anything runs. Raises `RecipeError` with the problems of the first variant that has any.

    A grid is `STEP.OPTION=A,B,C`; several options before the `=`, with commas between, take each value together.
    """
    axes = [list(_read_grid(grid)) for grid in grids]
    variants, stems = [], [path.stem for path in recipes]
    for path in recipes:
        for choice in itertools.product(*axes):
            settings = [setting for group in choice for setting in group]
            plan = make_plan(load_recipe(path, [*overrides, *settings]), catalog, store)
            shown = ", ".join(_shorten(group) for group in choice)
            recipe = path.stem if stems.count(path.stem) == 1 else str(path)
            name = ": ".join(filter(None, [recipe if len(recipes) > 1 or not shown else "", shown]))
            variants.append(_without_writers(Variant(name, plan)))
    return variants


def check_folder(folder: Path, variants: Sequence[Variant], places: Sequence[Place]) -> None:
    """Raise `CommandError` unless a comparison can be written there, in the place of an earlier one or of nothing.

    `places`: that must stay as they are, besides those that the recipes read.
    """
    target = folder.resolve()
    taken = list(places)
    for variant in variants:
        taken += find_model_places(variant.plan.model)
        for step in variant.plan.steps:
            taken += find_read_places(step.stage, step.id, step.writes)
    hit = next((place for place in taken if place.find_relation(target)), None)
    if hit is not None:
        raise CommandError(f"--out {str(folder)!r} {hit.find_relation(target)} {hit.name}; choose another folder")
    clash = find_clashing_export(target)
    if clash is not None:
        raise CommandError(f"--out {str(folder)!r} {clash}; choose another folder")
    try:
        check_target(folder, overwrite=True)
    except OptionError as error:
        raise CommandError(f"--out: {error}") from error
    name, reason = next(find_foreign_files(folder) if folder.is_dir() else iter(()), ("", ""))
    if name:
        holds = f"--out {str(folder)!r} holds {name!r}, which {reason.replace('an export', 'a comparison')}"
        raise CommandError(f"{holds}; choose another folder, or move that file away")


def _read_grid(grid: str) -> Iterator[list[str]]:
    """For each value, the `--set` options that give it."""
    targets, equals, values = grid.partition("=")
    where = f"--grid {grid}"
    if not equals or not values or not all("." in target for target in targets.split(",")):
        raise RecipeError([Problem(where, "must look like STEP.OPTION=A,B,C, for example prune.ratio=0.1,0.25")])
    for value in load_yaml(f"[{values}]", where).data:
        yield [f"{target}={json.dumps(value)}" for target in targets.split(",")]


def _shorten(settings: list[str]) -> str:
    """`ratio 0.25` for `gradmap_score.ratio=0.25` and `prune.ratio=0.25`."""
    options = dict.fromkeys(setting.partition("=")[0].rpartition(".")[2] for setting in settings)
    value = settings[0].partition("=")[2].strip('"')
    return f"{'/'.join(options)} {value}"


def _without_writers(variant: Variant) -> Variant:
    kept, left_out = [], set()
    for step in variant.plan.steps:
        if step.writes or any(source in left_out for source, _ in step.inputs.values()):
            left_out.add(step.id)
        else:
            kept.append(step)
    return replace(variant, plan=replace(variant.plan, steps=kept), left_out=tuple(left_out))


@dataclass
class Comparison:
    """Rows in the order of the variants, whole models first; and what went wrong."""

    rows: list[Row] = field(default_factory=list)
    failures: list[tuple[str, GradmapError]] = field(default_factory=list)
    """Variant, and what went wrong."""

    @property
    def columns(self) -> list[str]:
        """Columns of all metrics that some model has."""
        return list(dict.fromkeys(column for row in self.rows for column in row.metrics))


def run_variants(variants: Sequence[Variant], store: Store, machine: Machine, reporter: Reporter) -> Comparison:
    """Run each; what they share is computed once. A variant that fails is told at the end, and the others go on."""
    comparison = Comparison()
    ended: list[tuple[Variant, RunState]] = []
    for variant in variants:
        try:
            ended.append((variant, run_plan(variant.plan, store, machine, reporter)))
        except GradmapError as error:
            comparison.failures.append((variant.name, error))
    measured = [replace(one, run=variant.name) for variant, ran in ended for one in ran.measured]
    by_run: dict[str, dict[str, dict[str, Metric]]] = {}
    for column, one in zip(name_columns(measured), measured, strict=True):
        by_run.setdefault(one.run, {}).setdefault(one.metric.model, {})[column] = one.metric
    dense: dict[tuple[Any, ...], Row] = {}
    for variant, ran in ended:
        rows = list(_list_rows(ran, variant.name, by_run.get(variant.name, {})))
        for row in rows:
            if row.label == "dense":
                figures = tuple((column, metric.value) for column, metric in row.metrics.items())
                dense.setdefault((row.parameters, figures), replace(row, name=variant.plan.model.name))
        made = [row for row in rows if row.label != "dense"]
        if not made:
            advice = "put evaluate before the step that writes"
            comparison.failures.append(
                (variant.name, StageError(f"evaluates no model that it makes, besides those left out; {advice}"))
            )
        comparison.rows += made[-1:]
    comparison.rows[:0] = dense.values()
    return comparison


def _list_rows(ran: RunState, name: str, metrics: Mapping[str, dict[str, Metric]]) -> Iterator[Row]:
    """Each model of a run that was measured, in order. `metrics`: by digest of the model and column."""
    seen: set[str] = set()
    seconds = {step.step: step.computed_seconds for step in ran.finished}
    for step, given in ran.outputs.items():
        for model in given.values():
            if not isinstance(model, Model | Export) or model.digest in seen:
                continue
            seen.add(model.digest)
            if model.digest not in metrics:
                continue
            graph = model.graph
            path = [] if step == MODEL_STEP else [finished.id for finished in ran.lineage[step]]
            works = [work for before in path for work in ran.outputs[before].values() if isinstance(work, Work)]
            yield Row(
                name=name,
                label=model.label,
                layers=len(graph.layers),
                parameters=graph.count_parameters(),
                bytes=model.size_bytes,
                metrics=metrics[model.digest],
                seconds=sum(seconds[before] for before in path),
                layer_evaluations=sum(work.layer_evaluations for work in works) if works else None,
            )
