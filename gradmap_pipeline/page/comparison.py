"""Several models on one page: each metric against size, with those that no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from ..metrics import Metric
from ..text import format_bytes, format_seconds, show
from .facts import show_metric
from .page import Cell, Table, fill_template
from .pictures import PICTURE_START, PICTURE_STYLE, list_ticks, settle, show_tick, widen, write_text
from .template import COMPARISON

_WIDTH, _HEIGHT = 960, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 24, 54
_LOG_FROM = 20.0
"""Largest over smallest value, from which a metric is drawn on a logarithmic scale."""


@dataclass(frozen=True)
class Compared:
    """One variant of a comparison."""

    name: str
    label: str
    """What was done to the model last."""
    layers: int
    parameters: int
    bytes: int
    metrics: Mapping[str, Metric]
    """By column."""
    seconds: float


@dataclass(frozen=True)
class _Picture:
    title: str
    svg: object


def make_comparison_page(variants: Sequence[Compared], columns: Sequence[str], made_by: str) -> str:
    """The page of a comparison. Names are text in it, never markup."""
    from markupsafe import Markup

    headings = ("", "variant", "model", "layers", "parameters", "size", *columns, "time to make")
    rows = []
    for number, variant in enumerate(variants, 1):
        figures = [show_metric(variant.metrics[column]) if column in variant.metrics else "" for column in columns]
        time = format_seconds(variant.seconds) if variant.seconds else ""
        sizes = [str(variant.layers), f"{variant.parameters:,}", format_bytes(variant.bytes)]
        rows.append([Cell(text) for text in (str(number), variant.name, variant.label, *sizes, *figures, time)])
    return fill_template(
        COMPARISON,
        title=f"Comparison of {len(variants)} models",
        subtitle="Numbers are those of the table. Points on the line are models that no other beats in size and metric at once.",
        pictures=[_Picture(f"{column} by size", Markup(draw_tradeoff(variants, column))) for column in columns],
        rows=Table(headings, rows, headings[3:]),
        made_by=made_by,
    )


def find_front(points: Mapping[int, tuple[float, float]], better: Literal["lower", "higher"]) -> list[int]:
    """The points that no other beats, from the smallest up. A point is (size, value); one beats another where it is at least as
    good in both and better in one.
    """
    sign = 1 if better == "lower" else -1

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and sign * one[1] <= sign * other[1] and one != other

    front = [key for key, point in points.items() if not any(beats(other, point) for other in points.values())]
    return sorted(front, key=lambda key: points[key])


def draw_tradeoff(variants: Sequence[Compared], column: str) -> str:
    """A metric against size in bytes: a point for each variant that has it, numbered from 1."""
    points: dict[int, tuple[float, float]] = {}
    better: Literal["lower", "higher"] = "lower"
    for number, variant in enumerate(variants, 1):
        metric = variant.metrics.get(column)
        if metric is not None:
            points[number], better = (variant.bytes / 1e6, settle(metric.value)), metric.better
    values = [y for _, y in points.values()]
    is_log = min(values) > 0 and max(values) / min(values) >= _LOG_FROM
    low_x, high_x = _range([x for x, _ in points.values()])
    low_y, high_y = (math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)) if is_log else _range(values)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)
        height = math.log10(point[1]) if is_log else point[1]
        up = (height - low_y) / (high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)

    parts = []
    for value in _list_powers(low_y, high_y) if is_log else list_ticks(low_y, high_y):
        y = place((low_x, value))[1]
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(write_text(_LEFT - 8, y + 4, show_tick(value), "gm-soft", "end"))
    for value in list_ticks(low_x, high_x):
        parts.append(write_text(place((value, values[0]))[0], _HEIGHT - _BOTTOM + 20, show_tick(value), "gm-soft", "middle"))
    about = f"size in MB (10⁶ bytes); {better} is better{', on a logarithmic scale' if is_log else ''}"
    parts.append(write_text(_WIDTH - _RIGHT, _HEIGHT - 10, about, "gm-soft", "end"))
    front = find_front(points, better)
    line = " ".join(",".join(map(str, place(points[number]))) for number in front)
    parts.append(f'<polyline points="{line}"/>')
    for number, point in points.items():
        x, y = place(point)
        kind = "gm-keep" if number in front else "gm-ring"
        told = escape(show(f"{variants[number - 1].name}: {point[1]:.5g}, {point[0]:.4g} MB"))
        parts.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="5"><title>{told}</title></circle>')
        parts.append(write_text(x + 9, y - 7, str(number)))
    title = escape(show(f"{column} by size"))
    return (
        f'{PICTURE_START} viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{title}</title>'
        f"<style>{PICTURE_STYLE}</style>{''.join(parts)}</svg>"
    )


def _list_powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between 10^low and 10^high; powers alone where these are many."""
    digits = (1, 2, 5) if high - low < 2 else (1,)
    numbers = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in digits]
    return [number for number in numbers if low <= math.log10(number) <= high]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """A range of round numbers around some values, with room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return widen(low - room, high + room)
