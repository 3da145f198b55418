"""Pictures of a model's layers as SVG: how important each is and what became of it, and how far the stream had drifted.

A picture has its own styles for light and dark, so it stands alone in a file as well as in a page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from ..text import show
from .facts import Facts
from .views import Correction, Ranking

_WIDTH, _HEIGHT = 960, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 58, 34
_LOG_FROM = 50.0
"""Largest over smallest score, from which the scores are drawn on a logarithmic scale."""
_MOST_LABELS = 32
PICTURE_START = '<svg class="gm" xmlns="http://www.w3.org/2000/svg"'
"""How every picture begins."""
PICTURE_STYLE = """\
.gm{--gm-ink:#1f2933;--gm-soft:#6b7785;--gm-line:#d5dbe1;--gm-keep:#2f6fb3;--gm-cut:#d1495b;--gm-fix:#b7791f;\
font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
@media(prefers-color-scheme:dark){.gm{--gm-ink:#e6eaee;--gm-soft:#9aa7b4;--gm-line:#3a444e;--gm-keep:#6fa8e6;--gm-cut:#f08391;--gm-fix:#e7b55a}}
@media print{.gm{--gm-ink:#1f2933;--gm-soft:#555;--gm-line:#ccc;--gm-keep:#2f6fb3;--gm-cut:#d1495b;--gm-fix:#b7791f}}
.gm text{fill:var(--gm-ink)}.gm .gm-soft{fill:var(--gm-soft)}.gm .gm-title{font-weight:600;font-size:14px}
.gm line{stroke:var(--gm-line)}.gm .gm-keep{fill:var(--gm-keep)}.gm .gm-fix{fill:var(--gm-fix)}
.gm .gm-cut{fill:var(--gm-cut);fill-opacity:.28;stroke:var(--gm-cut);stroke-width:1.5;stroke-dasharray:4 2}
.gm .gm-none{fill:none;stroke:var(--gm-line);stroke-dasharray:2 3}.gm .gm-order{fill:var(--gm-cut);font-weight:600}
.gm polyline{fill:none;stroke:var(--gm-keep);stroke-width:2}.gm .gm-ring{fill:none;stroke:var(--gm-keep);stroke-width:2}
"""


def draw_layers(facts: Facts) -> str:
    """One picture of all that is known of the layers: importance above, drift below it where a correction recorded it."""
    panels = [_draw_importance(facts)]
    if facts.correction is not None:
        panels += _draw_drift(facts.correction, facts)
    height = _HEIGHT * len(panels)
    placed = "".join(f'<g transform="translate(0 {number * _HEIGHT})">{panel}</g>' for number, panel in enumerate(panels))
    title = f"Layers of {show(facts.base.name)}: {len(facts.kept)} of {facts.base.layers} kept"
    about = f"Removed, counted from 0: {', '.join(map(str, facts.removed)) or 'none'}."
    return (
        f'{PICTURE_START} viewBox="0 0 {_WIDTH} {height}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc><style>{PICTURE_STYLE}</style>{placed}</svg>"
    )


class _Axes:
    """One panel: a place across for each base layer, and a scale upwards."""

    def __init__(self, layers: int, low: float, high: float, *, is_log: bool = False) -> None:
        self.layers, self.is_log = layers, is_log
        self.low, self.high = (low, high) if is_log else widen(low, high)
        self.step = (_WIDTH - _LEFT - _RIGHT) / max(1, layers)

    def x(self, layer: int) -> float:
        """The middle of a layer's place."""
        return round(_LEFT + (layer + 0.5) * self.step, 1)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def draw(self, title: str, unit: str = "") -> str:
        """The title, lines across with their values, and the numbers of the layers."""
        parts = [write_text(_LEFT, 20, title, "gm-title")]
        for value in self._ticks():
            y = self.y(value)
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(write_text(_LEFT - 8, y + 4, f"{show_tick(value)}{unit}", "gm-soft", "end"))
        every = -(-self.layers // _MOST_LABELS)
        for layer in range(0, self.layers, every):
            parts.append(write_text(self.x(layer), _HEIGHT - _BOTTOM + 18, str(layer), "gm-soft", "middle"))
        return "".join(parts)

    def _ticks(self) -> list[float]:
        if self.is_log:
            return [self.low * (self.high / self.low) ** (part / 3) for part in range(4)]
        return list_ticks(self.low, self.high)


def _draw_importance(facts: Facts) -> str:
    """Score of each layer when all were there, in which order they went, and which were corrected."""
    ranking, removed = facts.ranking, set(facts.removed)
    corrected = {site.layer for site in facts.correction.sites} if facts.correction else set()
    scores = _first_scores(ranking, facts.base.layers)
    low, high = min([0.0, *scores.values()]), max([0.0, *scores.values()])
    smallest = min(scores.values(), default=0.0)
    is_log = bool(scores) and smallest > 0 and high / smallest >= _LOG_FROM
    axes = _Axes(facts.base.layers, smallest / 2 if is_log else low, high, is_log=is_log)
    title = f"Importance by {show(ranking.method)}" if ranking and scores else "Layers (no ranking was recorded)"
    parts = [axes.draw(title + (", logarithmic scale" if is_log else "")) if scores else _draw_bare(axes, title)]
    order = {decision.removed: number for number, decision in enumerate(ranking.decisions, 1)} if ranking else {}
    width = max(2.0, min(40.0, axes.step * 0.72))
    floor = axes.y(axes.low if is_log else 0.0) if scores else float(_HEIGHT - _BOTTOM)
    for layer in range(facts.base.layers):
        kind = "gm-cut" if layer in removed else "gm-keep"
        x, top = axes.x(layer) - width / 2, axes.y(scores[layer]) if layer in scores else float(_TOP + 20)
        above, height = min(top, floor), max(2.0, abs(floor - top))
        was = "removed" if layer in removed else "kept, corrected" if layer in corrected else "kept"
        known = f"score {scores[layer]:.4g}" if layer in scores else "no score"
        shape = kind if layer in scores or layer in removed else f"{kind} gm-none" if not scores else "gm-none"
        parts.append(f'<rect class="{shape}" x="{x:.1f}" y="{above}" width="{width:.1f}" height="{height:.1f}" rx="2">')
        parts.append(f"<title>layer {layer}: {was}, {known}</title></rect>")
        if layer in removed and layer in order and axes.step >= 12:
            parts.append(write_text(axes.x(layer), above - 5, str(order[layer]), "gm-order", "middle"))
        if layer in corrected:
            y, half = _HEIGHT - _BOTTOM + 25, min(4.0, axes.step / 2)
            points = f"{axes.x(layer)},{y - half} {axes.x(layer) + half},{y} {axes.x(layer)},{y + half} {axes.x(layer) - half},{y}"
            parts.append(f'<polygon class="gm-fix" points="{points}"/>')
    return "".join(parts) + _draw_legend(bool(removed), bool(order.keys() & removed), bool(corrected))


def _first_scores(ranking: Ranking | None, layers: int) -> dict[int, float]:
    """Of each layer, the score of the first decision that gave it one."""
    scores: dict[int, float] = {}
    for decision in ranking.decisions if ranking else ():
        for layer, score in decision.scores.items():
            if 0 <= layer < layers:
                scores.setdefault(layer, settle(score))
    return scores


def _draw_bare(axes: _Axes, title: str) -> str:
    numbers = range(0, axes.layers, -(-axes.layers // _MOST_LABELS))
    labels = [write_text(axes.x(layer), _HEIGHT - _BOTTOM + 18, str(layer), "gm-soft", "middle") for layer in numbers]
    return write_text(_LEFT, 20, title, "gm-title") + "".join(labels)


def _draw_legend(has_removed: bool, has_order: bool, has_corrected: bool) -> str:
    x, parts = _LEFT, []
    entries = [("gm-keep", "kept")]
    if has_removed:
        entries.append(("gm-cut", "removed; the number is the order" if has_order else "removed"))
    for kind, label in entries:
        parts.append(
            f'<rect class="{kind}" x="{x}" y="30" width="12" height="12" rx="2"/>{write_text(x + 18, 41, label, "gm-soft")}'
        )
        x += 44 + 7 * len(label)
    if has_corrected:
        parts.append(f'<polygon class="gm-fix" points="{x + 6},31 {x + 11},36 {x + 6},41 {x + 1},36"/>')
        parts.append(write_text(x + 18, 41, "corrected", "gm-soft"))
    return "".join(parts)


def _draw_drift(correction: Correction, facts: Facts) -> list[str]:
    """How far the stream had drifted at each place when it was corrected, and what the correction left of it."""
    layers = facts.base.layers
    sites = [site for site in correction.sites if 0 <= site.layer < layers]
    panels = []
    if correction.shifts:
        shifts = {layer: settle(shift) for layer, shift in correction.shifts.items() if 0 <= layer < layers}
        panels.append(_draw_series(layers, "Mean shift of the stream before any correction", {"shift": shifts}, ""))
    if sites:
        before = {
            _name_role(role): {s.layer: 100 * settle(s.relative_shift) for s in sites if s.role == role} for role in _roles(sites)
        }
        left = {
            _name_role(role): {s.layer: 100 * settle(s.missing_left) for s in sites if s.role == role} for role in _roles(sites)
        }
        title = "Drift where the correction found it: mean shift over the mean norm, layers below corrected already"
        panels.append(_draw_series(layers, title, before, "%"))
        panels.append(
            _draw_series(layers, "Left of the squared missing residual after the correction (before: 100%)", left, "%", 100)
        )
    return panels


def _roles(sites: Sequence[object]) -> list[str]:
    """Roles of sites, the one at a layer's output first."""
    return sorted({str(getattr(site, "role", "")) for site in sites}, key=lambda role: (role == "attention", role))


def _name_role(role: str) -> str:
    return {"output": "at the layer's output", "norm": "in the norm at the layer's output", "attention": "at the attention"}.get(
        role, role
    )


def _draw_series(layers: int, title: str, series: Mapping[str, Mapping[int, float]], unit: str, high: float | None = None) -> str:
    """Points by layer: the first series filled with a line, the others as rings."""
    most = max((value for points in series.values() for value in points.values()), default=0.0)
    axes = _Axes(layers, 0.0, max(high or 0.0, most))
    parts, x = [axes.draw(title, unit)], _LEFT
    for number, (name, points) in enumerate(series.items()):
        kind = "gm-ring" if number else "gm-keep"
        if not number:
            line = " ".join(f"{axes.x(layer)},{axes.y(value)}" for layer, value in sorted(points.items()))
            parts.append(f'<polyline points="{line}"/>')
        for layer, value in sorted(points.items()):
            told = f"layer {layer}, {escape(show(name))}: {value:.3g}{unit}"
            parts.append(f'<circle class="{kind}" cx="{axes.x(layer)}" cy="{axes.y(value)}" r="4"><title>{told}</title></circle>')
        if len(series) > 1:
            parts.append(f'<circle class="{kind}" cx="{x + 6}" cy="36" r="4"/>{write_text(x + 18, 41, name, "gm-soft")}')
            x += 44 + 7 * len(name)
    return "".join(parts)


def _round_up(step: float) -> float:
    """The next larger number that is 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 2.5, 5, 10) if power * digit >= step * (1 - 1e-9))


def widen(low: float, high: float) -> tuple[float, float]:
    """The range between two round numbers that holds this one; of a single number, one above it."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0)
    step = _round_up((high - low) / 4)
    return step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)


def list_ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range."""
    step = _round_up((high - low) / 4)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def settle(value: float) -> float:
    """A number that can be drawn: 0 for what is too small to be divided by, and the most that is drawn for what is larger."""
    return 0.0 if abs(value) < 1e-100 else max(-1e100, min(1e100, value))


def show_tick(value: float) -> str:
    """A number at an axis: 0.25, 1500, 20,000."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}" if value % 1 == 0 else f"{value:.3g}"


def write_text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(show(text))}</text>'
