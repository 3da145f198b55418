"""What a pruned model is to meet, and how many layers have to go for it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..errors import OptionError, StageError
from ..machine.memory import parse_size

if TYPE_CHECKING:
    from ..checkpoint.forecast import ModelForecast
    from ..checkpoint.graph import ModelGraph
    from ..context import Context
    from ..data.calibration_set import CalibrationSet
    from .layer_scores import ScoresForecast

_THOUSANDS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_SHARE_TRIED = 0.5
"""Of the layers, at most, may go for what is measured."""


def parse_count(given: Any) -> Any:
    """A number of parameters: `110M`, `1.5B`, `350k` or a plain number. Raises `ValueError`."""
    if not isinstance(given, str):
        return given
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMB]?)\s*", given, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"found {given[:40]!r}, accepted: a number of parameters such as 110M, 1.5B or 110000000")
    return round(float(match[1]) * _THOUSANDS[match[2].upper()])


def _parse_bytes(given: Any) -> Any:
    return parse_size(given) if isinstance(given, str) else given


class PruningTarget(BaseModel):
    """What the pruned model is to meet: one of these."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    parameters: Annotated[int | None, BeforeValidator(parse_count)] = Field(
        None, ge=1, description="Most parameters: `110M`, `1.5B` or a plain number."
    )
    bytes: Annotated[int | None, BeforeValidator(_parse_bytes)] = Field(
        None, ge=1, description="Most bytes of its weights, before a later step quantises them: `500MB`, `1GiB` or a plain number."
    )
    max_perplexity_ratio: float | None = Field(
        None, gt=1, description="Largest perplexity on the calibration set, relative to the model that is pruned."
    )
    tokens_per_second: float | None = Field(
        None, gt=0, description="Least tokens a second, decoded one after another on this machine, one sequence at a time."
    )

    @model_validator(mode="after")
    def _check_one(self) -> PruningTarget:
        names = tuple(type(self).model_fields)
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(names)}; found {' and '.join(given) or 'none'}")
        return self

    @property
    def measured_text(self) -> bool:
        """Whether text has to be read to tell what meets it."""
        return self.max_perplexity_ratio is not None

    @property
    def is_timed(self) -> bool:
        """Whether models have to be timed to tell what meets it, so that it depends on the machine."""
        return self.tokens_per_second is not None

    @property
    def _has_size(self) -> bool:
        """Whether the shapes of tensors tell what meets it."""
        return self.parameters is not None or self.bytes is not None

    def count_worst(self, model: ModelForecast, scores: ScoresForecast) -> int | None:
        """How many layers may have to go, whichever they are; None where the plan does not know.

        Raises `OptionError` of 'target' where none has to, or where all that are not protected do not suffice.
        """
        if not self._has_size:
            if model.layers is None:
                return None
            most = model.layers - 1 if scores.removable is None else scores.removable
            return max(1, min(math.ceil(_SHARE_TRIED * model.layers), most))
        graph = _open(model)
        sizes = [self._size_of_layer(graph, layer) for layer in graph.layers]
        removable = len(sizes) - 1 if scores.removable is None else scores.removable
        total, limit = self._size_of(graph), self._limit
        if total <= limit:
            raise OptionError("target", f"the model has {total:,} {self._unit}, and {limit:,} are aimed at; leave this step out")
        least = total - sum(sorted(sizes)[len(sizes) - removable :])
        if least > limit:
            raise OptionError(
                "target",
                f"{limit:,} {self._unit} cannot be reached: at most {removable} of {len(sizes)} layers can be removed, which "
                f"leaves {least:,}; aim at that or more, or protect fewer layers in the step that scores",
            )
        return _count_until(sorted(sizes), total - limit, removable)

    def check_scored(self, model: ModelForecast, scores: ScoresForecast) -> None:
        """Raise `OptionError` of 'target' where more removals are needed, whichever they are, than are scored."""
        if not self._has_size or scores.decisions is None:
            return
        graph = _open(model)
        sizes = sorted((self._size_of_layer(graph, layer) for layer in graph.layers), reverse=True)
        needed = _count_until(sizes, self._size_of(graph) - self._limit, len(sizes))
        if needed > scores.decisions:
            raise OptionError(
                "target",
                f"takes at least {needed} of {len(sizes)} layers, but only {scores.decisions} removals are scored; leave 'ratio' "
                "and 'layers' out of the step that scores, which then prepares as many as are needed",
            )

    def choose(
        self,
        model: ModelGraph,
        most: int,
        take: Callable[[int], Sequence[int]],
        text: CalibrationSet | None,
        context: Context,
        time_model: Callable[[ModelGraph], float] | None = None,
    ) -> list[int]:
        """The fewest base layers to remove for a size or a speed, or the most for a perplexity.

        `take(n)`: the n layers to remove, n from 1 to `most`. `time_model`: gives the tokens a second of a model; needed for a
        target of speed alone. Raises `StageError` where no number of layers will do.
        """
        if self.tokens_per_second is not None:
            assert time_model is not None
            return list(take(self._count_for_speed(self.tokens_per_second, model, most, take, context, time_model)))
        if self.max_perplexity_ratio is None:
            for count in range(1, most + 1):
                if self._size_of(model.without_layers(take(count))) <= self._limit:
                    return list(take(count))
            least = self._size_of(model.without_layers(take(most)))
            raise StageError(
                f"all {most} scored removals leave {least:,} {self._unit}, and {self._limit:,} are aimed at; leave 'ratio' and "
                "'layers' out of the step that scores, which then prepares as many as are needed"
            )
        assert text is not None
        whole = _measure(model, text, context)

        @cache
        def ratio(count: int) -> float:
            return math.exp(min(_measure(model.without_layers(take(count)), text, context) - whole, 700))

        limit = self.max_perplexity_ratio
        count = find_most(lambda count: ratio(count) <= limit, most)
        if not count:
            raise StageError(
                f"without its least important layer, the perplexity of the model on the calibration set is {ratio(1):.3f} times "
                f"what it is with it, over the {limit:g} aimed at; aim at that or more"
            )
        context.note(
            f"perplexity on the calibration set without {count} of {len(model.layers)} layers: {ratio(count):.3f} times that before"
        )
        if count == most:
            context.note(f"all {most} scored removals hold the target; set 'ratio' on the step that scores to prepare more")
        return list(take(count))

    def _count_for_speed(
        self,
        limit: float,
        model: ModelGraph,
        most: int,
        take: Callable[[int], Sequence[int]],
        context: Context,
        time_model: Callable[[ModelGraph], float],
    ) -> int:
        @cache
        def rate(count: int) -> float:
            return time_model(model.without_layers(take(count)) if count else model)

        whole = len(model.layers)
        if rate(0) >= limit:
            raise StageError(
                f"the model gives {rate(0):.3g} tokens/s on this machine with all its {whole} layers, and {limit:g} are aimed at; "
                "leave this step out"
            )
        if rate(most) < limit:
            raise StageError(
                f"{limit:g} tokens/s cannot be reached on this machine: without {most} of {whole} layers, as many as are scored, "
                f"the model gives {rate(most):.3g}, and {rate(0):.3g} with all; aim at less, or remove more with 'layers'"
            )
        count = 1 + find_most(lambda count: rate(count) < limit, most - 1)
        context.note(
            f"decoding without {count} of {whole} layers: {rate(count):.3g} tokens/s on this machine, {rate(0):.3g} before; on "
            "another machine the target may take another number of layers"
        )
        return count

    @property
    def _unit(self) -> str:
        return "parameters" if self.parameters is not None else "bytes"

    @property
    def _limit(self) -> int:
        limit = self.bytes if self.parameters is None else self.parameters
        assert limit is not None
        return limit

    def _size_of(self, model: ModelGraph) -> int:
        return self._add_up(model.other_tensors(), model) + sum(self._size_of_layer(model, layer) for layer in model.layers)

    def _size_of_layer(self, model: ModelGraph, layer: int) -> int:
        return self._add_up(model.layer_tensors(layer), model)

    def _add_up(self, tensors: Mapping[str, Any], model: ModelGraph) -> int:
        if self.parameters is not None:
            return sum(tensor.elements for tensor in tensors.values())
        return sum(tensor.size_as(model.dtype) for tensor in tensors.values())


def find_most(is_held: Callable[[int], bool], most: int) -> int:
    """The largest count up to `most` for which something holds that holds for fewer too, by bisection; 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_held(middle) else (low, middle - 1)
    return low


def _count_until(sizes: Sequence[int], excess: int, most: int) -> int:
    """How many of the sizes, in their order, add up to at least `excess`; `most` where all do not."""
    total = 0
    for count, size in enumerate(sizes[:most], 1):
        total += size
        if total >= excess:
            return count
    return most


def _open(forecast: ModelForecast) -> ModelGraph:
    """The model that is known before a run, whose files are not read but for their headers."""
    from ..checkpoint.graph import open_folder

    if forecast.folder is None:
        raise OptionError("target", "how large the model is shows when it is on this machine; download it first, or give 'ratio'")
    graph = open_folder(forecast.folder, dtype=forecast.dtype, digest_of=lambda _: "")
    gone = set(graph.layers) - set(forecast.kept or graph.layers)
    return graph.without_layers(gone) if gone else graph


def _measure(model: ModelGraph, text: CalibrationSet, context: Context) -> float:
    """Mean loss of the text in nats a token."""
    from ..batches import count_predicted
    from ..sweep.sweep import open_sweep

    def score() -> float:
        with open_sweep(model, text.load(), context) as sweep:
            total = sum(float(losses.double().sum()) for losses in sweep.losses())
            return total / count_predicted(sweep.batches)

    key = {"model": model.model_copy(update={"label": ""}).content(), "calibration": text.digest}
    return float(context.remember(key, score))
