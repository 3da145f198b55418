"""How losses fell while a model was trained as a whole, as SVG."""

from __future__ import annotations

from html import escape

from .pictures import PICTURE_START, PICTURE_STYLE, list_ticks, settle, show_tick, widen, write_text
from .views import Training

_WIDTH, _HEIGHT = 960, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 58, 48


def draw_training(training: Training) -> str:
    """Loss of the steps as a line, on held-out samples as rings, and before and after; empty where no curve was recorded."""
    losses = {point.step: settle(point.loss) for point in training.curve if point.loss is not None}
    looks = {0: settle(training.before)} | {
        point.step: settle(point.held_out) for point in training.curve if point.held_out is not None
    }
    if not losses:
        return ""
    low, high = widen(min([*losses.values(), *looks.values()]), max([*losses.values(), *looks.values()]))
    last = max([*losses, *looks])

    def x(step: int) -> float:
        return round(_LEFT + step / last * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [write_text(_LEFT, 20, "Loss while the whole model was trained, nats a token", "gm-title")]
    for value in list_ticks(low, high):
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(write_text(_LEFT - 8, y(value) + 4, show_tick(value), "gm-soft", "end"))
    for step in [step for step in map(int, list_ticks(*widen(0, last))) if step <= last]:
        parts.append(write_text(x(step), _HEIGHT - _BOTTOM + 18, str(step), "gm-soft", "middle"))
    parts.append(write_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, "step", "gm-soft", "middle"))
    line = " ".join(f"{x(step)},{y(value)}" for step, value in sorted(losses.items()))
    parts.append(f'<polyline points="{line}"/>')
    for step, value in sorted(looks.items()):
        best = ", the best" if step == training.best_step else ""
        told = escape(f"step {step}: {value:.4g} on held-out samples{best}")
        chosen = "gm-fix" if step == training.best_step else "gm-ring"
        parts.append(f'<circle class="{chosen}" cx="{x(step)}" cy="{y(value)}" r="4"><title>{told}</title></circle>')
    entries = [("gm-keep", "training samples, as a line"), ("gm-ring", "held-out samples"), ("gm-fix", "the best, which was kept")]
    across = _LEFT
    for name, label in entries:
        parts.append(f'<circle class="{name}" cx="{across + 6}" cy="36" r="4"/>{write_text(across + 18, 41, label, "gm-soft")}')
        across += 44 + 7 * len(label)
    about = f"<title>Training curve of {training.steps} steps</title>"
    return (
        f'{PICTURE_START} viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{about}<style>{PICTURE_STYLE}</style>{"".join(parts)}</svg>'
    )
