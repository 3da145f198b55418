"""A run or an export as one page of HTML, complete in itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..text import format_bytes, format_seconds, name_without_place, show, show_lines
from .facts import Facts, show_metric
from .pictures import draw_layers
from .template import FOOT, GENERATOR, HEAD, PAGE, STYLE
from .training_picture import draw_training
from .views import Answers, Loss, Speed, Training


@dataclass(frozen=True)
class Cell:
    """Text in a table, and what it is: `code`, `good`, `bad`, or nothing in particular."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows; `numbers`: the columns of figures."""

    headings: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A table under a heading."""

    heading: str
    table: Table
    about: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure, before and after."""

    name: str
    value: str
    change: str = ""


@dataclass(frozen=True)
class AnswerGroup:
    """Answers of one step, and how they were made."""

    about: str
    answers: Sequence[Any] = field(default_factory=tuple)


@dataclass(frozen=True)
class TrainingShown:
    """A training curve, and what it led to."""

    about: str
    picture: Any


def fill_template(body: str, **values: Any) -> str:
    """A page from a template of what stands between head and foot. Every value is text in it, unless it is `Markup`."""
    from jinja2 import Environment
    from markupsafe import Markup

    def as_text(value: Any) -> Any:
        return value if isinstance(value, Markup) else show_lines(str(value))

    filled = Environment(autoescape=True, finalize=as_text).from_string(HEAD + body + FOOT)
    return filled.render(style=Markup(STYLE), generator=Markup(GENERATOR), **values)


def make_page(facts: Facts) -> str:
    """The page. Whatever comes from names, files and models is text in it, never markup."""
    from markupsafe import Markup

    return fill_template(
        PAGE,
        title=_make_title(facts),
        subtitle=_make_subtitle(facts),
        failure=facts.failure,
        tiles=_make_tiles(facts),
        picture=Markup(draw_layers(facts)),
        removed=", ".join(map(str, facts.removed)) or "none",
        sites=_list_sites(facts),
        patched=facts.patched,
        trainings=[
            TrainingShown(_tell_training(step.id, training), Markup(picture))
            for step, training in facts.find(Training)
            if (picture := draw_training(training))
        ],
        parts=[
            Part("Figures", _list_metrics(facts), _explain_metrics(facts)),
            Part("Limits", _list_limits(facts)),
            Part("Losses", _list_losses(facts), "Mean next-token cross-entropy on the texts that steps measured."),
            *(Part("Speed", _list_rates(speed), f"Step {step.id}: {_explain_speed(speed)}") for step, speed in facts.find(Speed)),
            Part("Steps", _list_steps(facts), _explain_steps(facts)),
        ],
        answers=[
            AnswerGroup(f"Greedy, at most {group.tokens} tokens, step {step.id}.", group.answers)
            for step, group in facts.find(Answers)
        ],
        recipe=_show_recipe(facts),
        environment=_list_environment(facts),
        files=_list_files(facts),
        made_by=facts.made_by,
    )


def _make_title(facts: Facts) -> str:
    quantised = f", {facts.quantisation}" if facts.quantisation else ""
    return f"{name_without_place(facts.base.name)}, {len(facts.kept)} of {facts.base.layers} layers{quantised}"


def _make_subtitle(facts: Facts) -> str:
    parts = [facts.recipe_name, f"ended {facts.ended_at}" if facts.ended_at else ""]
    parts += [format_seconds(facts.seconds) if facts.seconds is not None else "", facts.made_by]
    return " · ".join(filter(None, parts))


def _make_tiles(facts: Facts) -> list[Tile]:
    before, after = facts.models[0], facts.models[-1]
    tiles = [_compare("Layers", before.layers, after.layers, str)]
    tiles.append(_compare("Parameters", before.parameters, after.parameters, "{:,}".format))
    tiles.append(_compare("Size", before.bytes, after.bytes, format_bytes))
    return tiles


def _tell_training(step: str, training: Training) -> str:
    kept = f"best after step {training.best_step}" if training.best_step else "no step lowered it, so the model is as it was"
    loss = f"loss on held-out samples {training.before:.4g} → {training.after:.4g}, {kept}"
    return f"Step {step}: {training.trained_parameters:,} parameters trained for {training.steps} steps; {loss}."


def _compare(name: str, before: int | None, after: int | None, form: Any) -> Tile:
    if after is None:
        return Tile(name, "not recorded")
    if before is None or before == after:
        return Tile(name, form(after), "as before" if before == after else "")
    return Tile(
        name,
        f"{form(before)} → {form(after)}",
        f"{(after - before) / before:+.1%}".replace("-", "\N{MINUS SIGN}") if before else "",
    )


def _list_metrics(facts: Facts) -> Table:
    """A row for each metric, a column for each model that has one."""
    models = [model for model in facts.models if model.metrics]
    labels = [model.label for model in models]
    names = [label if labels.count(label) == 1 else f"{label} ({number})" for number, label in enumerate(labels, 1)]
    rows = []
    for column in facts.columns:
        metrics = [model.metrics.get(column) for model in models]
        better = next(metric.better for metric in metrics if metric is not None)
        figures = [Cell("" if metric is None else show_metric(metric)) for metric in metrics]
        rows.append([Cell(f"{column} ({better} is better)"), *figures])
    return Table(("metric", *names), rows, tuple(names))


def _explain_metrics(facts: Facts) -> str:
    return "" if facts.recipe or facts.models[0].metrics else "Of the unpruned model nothing was measured before the export."


def _list_limits(facts: Facts) -> Table:
    rows = []
    for limit in facts.limits:
        verdict = Cell("kept", "good") if limit.missed_by is None else Cell(f"missed by {limit.missed_by:.4g}", "bad")
        rows.append([verdict, Cell(limit.step), Cell(limit.metric), Cell(limit.bound), *map(_figure, (limit.limit, limit.value))])
    return Table(("verdict", "step", "metric", "bound", "limit", "value"), rows, ("limit", "value"))


def _list_losses(facts: Facts) -> Table:
    rows = []
    for step, loss in facts.find(Loss):
        text = f"{name_without_place(loss.dataset)}, {loss.samples} x {loss.sequence_length} tokens"
        figures = [Cell(f"{loss.loss:.4f}"), _figure(loss.perplexity)]
        base = Cell("") if loss.base_perplexity is None else _figure(loss.base_perplexity)
        rows.append([Cell(step.id), *figures, base, Cell(loss.label), Cell(text)])
    headings = ("step", "loss (nats)", "perplexity", "of the unpruned", "model", "text")
    if not any(row[3].text for row in rows):
        return Table((*headings[:3], *headings[4:]), [[*row[:3], *row[4:]] for row in rows], headings[1:3])
    return Table(headings, rows, headings[1:4])


def _list_rates(speed: Speed) -> Table:
    """A row for each part of each kind of work: tokens a second of both models, and how many times faster the model is."""
    rows = []
    for case in speed.cases:
        for part in ("prefill", "decode"):
            after = f"{case.new_tokens} tokens after {case.prompt_tokens}"
            work = f"{case.sequences} x {after if part == 'decode' else f'{case.prompt_tokens} tokens'}"
            own: tuple[float, ...] = getattr(case.rates, part)
            other: tuple[float, ...] = () if case.reference is None else getattr(case.reference, part)
            ratios = [one / two for one, two in zip(own, other, strict=False)]
            rows.append([Cell(f"{part}, {work}"), *map(_median, (other, own, ratios))])
    headings = ("work", f"{speed.reference_label or 'beside it'} (tokens/s)", f"{speed.label} (tokens/s)", "times as fast")
    if any(case.reference for case in speed.cases):
        return Table(headings, rows, headings[1:])
    return Table((headings[0], headings[2]), [[row[0], row[2]] for row in rows], headings[2:3])


def _median(rounds: Sequence[float]) -> Cell:
    """The median of several rounds and their range; nothing where there are none."""
    middle, least, most = (f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in _spread(rounds))
    return Cell(f"{middle} ({least} to {most})" if rounds else "")


def _spread(rounds: Sequence[float]) -> tuple[float, float, float]:
    return (median(rounds), min(rounds), max(rounds)) if rounds else (0.0, 0.0, 0.0)


def _explain_speed(speed: Speed) -> str:
    rounds = len(speed.cases[0].rates.prefill) if speed.cases else 0
    place = f"{speed.program} in {speed.dtype} on {speed.device} ({speed.device_name}), threads: {speed.threads}"
    return f"{place}. Medians of {rounds} rounds in which the models took turns, with their range. Measured {speed.measured_at}."


def _list_sites(facts: Facts) -> Table:
    rows = []
    for site in facts.correction.sites if facts.correction else ():
        share = [f"{100 * site.relative_shift:.2f}%", f"{100 * site.missing_left:.1f}%"]
        rows.append([Cell(str(site.layer)), Cell(site.parameter, "code"), Cell(f"{site.shift:.4g}"), *map(Cell, share)])
    headings = ("layer", "weights", "mean shift", "of the mean norm", "residual left")
    return Table(headings, rows, headings[2:])


def _list_steps(facts: Facts) -> Table:
    """None for an export, whose page does not say how long it took, so that equal files have equal pages."""
    rows = []
    is_timed = any(step.seconds is not None for step in facts.steps)
    for step in facts.steps if is_timed else ():
        time = "" if step.seconds is None else format_seconds(step.seconds)
        figures = [Cell(time), Cell(format_bytes(step.peak_bytes or 0))]
        rows.append(
            [Cell(step.id), *figures, Cell("" if step.stage == step.id else step.stage), Cell("yes" if step.cached else "")]
        )
    return Table(("step", "time", "memory", "stage", "from the store"), rows, ("time", "memory"))


def _explain_steps(facts: Facts) -> str:
    told = "Times are those of the computation itself, also where the result came from the store."
    if any(step.peak_bytes for step in facts.steps):
        told += " Memory is the most that the process had held when the step ended."
    return told if any(step.seconds is not None for step in facts.steps) else ""


@dataclass(frozen=True)
class _RecipeText:
    heading: str
    text: str
    about: str = ""


def _show_recipe(facts: Facts) -> _RecipeText:
    if facts.recipe:
        changed = f"Set on the command line: {', '.join(facts.overrides)}." if facts.overrides else ""
        return _RecipeText("Recipe", facts.recipe.strip("\n"), changed)
    import yaml

    steps = [{"use": step.stage, "id": step.id, "with": _without_none(step.options)} for step in facts.steps]
    text = yaml.safe_dump(steps, sort_keys=False, allow_unicode=True, width=100)
    return _RecipeText(
        "Steps and options", text.strip("\n"), "The steps that led to the model, with the options that have a value."
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return value


def _list_environment(facts: Facts) -> Table:
    pairs = {**facts.machine, **{f"{name} version": version for name, version in facts.versions.items()}}
    pairs["unpruned model"] = facts.base.name
    rows = [[Cell(name), Cell(show(value))] for name, value in pairs.items()]
    rows.append([Cell("digest of the unpruned model"), Cell(facts.base.sha256, "code")])
    if facts.difference is not None:
        told = "largest difference of logits between the files and the model they were made from"
        rows.append([Cell(told), Cell(f"{facts.difference:.2g}")])
    return Table(("what", "value"), rows)


def _list_files(facts: Facts) -> Table:
    rows = [[Cell(name), Cell(f"{file.size:,}"), Cell(file.sha256, "code")] for name, file in facts.files.items()]
    return Table(("file", "bytes", "SHA-256"), rows, ("bytes",))


def _figure(value: float) -> Cell:
    return Cell(f"{value:.4g}")
