"""Metric: one figure that was measured of a model."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .errors import StageError
from .text import name_without_place


class Metric(BaseModel):
    """One figure that was measured of a model. Tables, limits, comparisons, model cards and JSON show it.

    Raises `StageError` where a number is not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """What was measured, in a few words: `perplexity`, `acc_norm`."""
    value: float
    better: Literal["lower", "higher"]
    """Which way is better."""
    unit: str = ""
    """Unit of the value and the standard error: `s`, `%`. Empty for a plain number."""
    stderr: Annotated[float | None, Field(ge=0)] = None
    """Standard error of the value, where it is known."""
    low: float | None = None
    """The least of several rounds, where the value is their median."""
    high: float | None = None
    """The largest of them."""
    on: str = ""
    """What it was measured on: the name of a data set or of a task. Tables have a column for each `name` and `on`."""
    on_option: str = ""
    """The option of the stage that names `on`. A result from the store then gets the name that the recipe has now."""
    setting: str = ""
    """How it was measured: `128 x 256 tokens`. Tables show it where one metric was measured in several ways."""
    model: str = ""
    """Digest of the model. Empty: the artifact that carries the metric says it in its field `model`."""
    is_reference: bool = False
    """Whether it is of a model that was measured for comparison alone: tables show it, and limits do not hold for it."""

    @model_validator(mode="after")
    def _check_finite(self) -> Metric:
        numbers = ((self.value, ""), (self.stderr, "the standard error of "), (self.low, "the least "), (self.high, "the largest "))
        for number, part in numbers:
            if number is not None and not math.isfinite(number):
                raise StageError(f"{part}metric {self.title!r} is {number}; a metric is a finite number")
        return self

    @property
    def title(self) -> str:
        """`perplexity on builtin heldout`: the name by which limits and tables find it."""
        return f"{self.name} on {self.on}" if self.on else self.name

    @property
    def place(self) -> str:
        """What it was measured on and how, without folders of this machine, for what is passed on."""
        return ", ".join(filter(None, (name_without_place(self.on), self.setting)))

    @property
    def figure(self) -> str:
        """The value with its standard error or the range of its rounds: `0.4312 ± 0.012`, `1.31 (1.28 to 1.35)`."""
        return self.shown_value + ("" if self.stderr is None else f" ± {self.stderr:.2g}")

    @property
    def shown_value(self) -> str:
        """The value; the median of several rounds to three digits, with their range, since rounds differ in the second."""
        if self.low is None or self.high is None:
            return show_number(self.value)
        return f"{_round_to_three(self.value)} ({_round_to_three(self.low)} to {_round_to_three(self.high)})"


def show_number(value: float) -> str:
    """A number as tables show it: three decimals, or four significant digits below 1."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 1 else f"{value:#.4g}"


def _round_to_three(value: float) -> str:
    return f"{float(f'{value:.3g}'):.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"
