"""Config fields that place layers by a formula, and the removals after which such a formula still holds.

A cadence marks layers (attention among state-space layers, experts among dense ones). A config of another depth can say only
what the formula can, so a removal must leave marks that some values of the fields produce.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Config = Mapping[str, Any]
Marks = tuple[bool, ...]
"""The kind that a cadence gives each layer."""


@dataclass(frozen=True)
class Cadence:
    """A formula over a layer's index, and the fields that hold its numbers."""

    fields: tuple[str, ...]
    marks: Callable[..., bool]
    """`marks(layer, *numbers)`"""
    numbers: Callable[[int], Iterator[tuple[int, ...]]]
    """`numbers(depth)`: all that make a difference."""
    exceptions: str | None = None
    """Field that lists layers which are not marked, whatever the formula says."""
    idle: Callable[[Config], bool] = lambda _: False
    """Whether marked and other layers are the same in this model."""

    def applies(self, config: Config) -> bool:
        """Whether this config uses it."""
        return all(isinstance(config.get(field), int) for field in self.fields) and not self.idle(config)

    def read(self, config: Config, depth: int) -> Marks:
        """Which layers a config marks."""
        numbers = [config[field] for field in self.fields]
        excepted = set((config.get(self.exceptions) if self.exceptions else None) or ())
        return tuple(self.marks(layer, *numbers) and layer not in excepted for layer in range(depth))

    def write(self, config: Config, wanted: Marks) -> dict[str, Any] | None:
        """Fields that mark exactly these layers, as near to those of the config as can be; None where no numbers do."""
        current = tuple(config[field] for field in self.fields)
        for numbers in (current, *self.numbers(len(wanted))):
            said = tuple(self.marks(layer, *numbers) for layer in range(len(wanted)))
            if said == wanted:
                return dict(zip(self.fields, numbers, strict=True)) | ({self.exceptions: []} if self.exceptions else {})
        if self.exceptions is None:
            return None
        ones = dict.fromkeys(self.fields, 1)
        return ones | {self.exceptions: [layer for layer, marked in enumerate(wanted) if not marked]}

    def possible(self, depth: int) -> list[Marks]:
        """All marks that a config of this depth can express; of cadences without exceptions."""
        said = (tuple(self.marks(layer, *numbers) for layer in range(depth)) for numbers in self.numbers(depth))
        return list(dict.fromkeys(said))


def _is_at_offset(layer: int, period: int, offset: int) -> bool:
    return period > 0 and layer % period == offset


def _periods_and_offsets(depth: int) -> Iterator[tuple[int, ...]]:
    return ((period, offset) for period in range(1, depth + 2) for offset in range(period))


def _is_nth(layer: int, step: int) -> bool:
    return step > 0 and (layer + 1) % step == 0


def _is_nth_between(layer: int, interval: int, first: int, last: int) -> bool:
    return _is_nth(layer, interval) and first <= layer <= last


def _intervals(depth: int) -> Iterator[tuple[int, ...]]:
    return ((n, first, last) for n in range(1, depth + 1) for first in range(depth + 1) for last in range(depth))


def _has_one_expert(config: Config) -> bool:
    count = config.get("num_experts")
    return isinstance(count, int) and count <= 1


CADENCES = (
    Cadence(("attn_layer_period", "attn_layer_offset"), _is_at_offset, _periods_and_offsets),
    Cadence(("expert_layer_period", "expert_layer_offset"), _is_at_offset, _periods_and_offsets, idle=_has_one_expert),
    Cadence(("decoder_sparse_step",), _is_nth, lambda depth: iter([(1,)]), exceptions="mlp_only_layers", idle=_has_one_expert),
    Cadence(("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"), _is_nth_between, _intervals),
)

REPLACED_BY_LIST = {"attn_layer_period": "layers_block_type"}
"""Cadences that a config uses only until it has the list they make."""


def cadences_of(config: Config) -> list[Cadence]:
    """The cadences by which a config places its layers."""
    return [
        cadence
        for cadence in CADENCES
        if cadence.applies(config) and not isinstance(config.get(REPLACED_BY_LIST.get(cadence.fields[0], "")), list)
    ]


def strict_cadences_of(config: Config) -> list[Cadence]:
    """The cadences that some removals break."""
    return [cadence for cadence in cadences_of(config) if cadence.exceptions is None]


LISTED = ("layer_types", "layers_block_type", "no_rope_layers", "mlp_layer_types")
"""Config fields that list a kind for each layer."""


def find_period(config: Config, depth: int) -> int | None:
    """After how many layers the kinds of layers, in all that a config says of them, start again; None where they never do."""
    kinds = _kinds(config, depth, range(depth), includes_lists=True)
    return next((n for n in range(1, depth // 2 + 1) if all(kinds[i] == kinds[i - n] for i in range(n, depth))), None)


def is_regular(config: Config, depth: int, kept: Sequence[int]) -> bool:
    """Whether the kinds of the layers kept follow each other as those of the whole model do, from the first on."""
    period = find_period(config, depth)
    kinds = _kinds(config, depth, range(depth), includes_lists=True)
    return period is not None and all(kinds[layer] == kinds[place % period] for place, layer in enumerate(kept))


def choose_kept(
    config: Config,
    depth: int,
    count: int,
    importance: Mapping[int, float],
    fixed: Collection[int] = (),
    *,
    regular: bool = False,
) -> tuple[int, ...]:
    """The `count` most important layers among the selections that the config's cadences can express; empty where there is none.

    `importance` by layer: layers it lacks are not kept; the sum over the kept ones is the largest possible. `fixed`: layers
    that are kept in any case. `regular`: among the selections that `is_regular` is true of.
    """
    layers = sorted(importance)
    kinds = _kinds(config, depth, layers, includes_lists=regular)
    bonus = 1 + sum(abs(value) for value in importance.values())
    values = [importance[layer] + bonus * (layer in fixed) for layer in layers]
    best: tuple[float, tuple[int, ...]] | None = None
    for wanted in _regular(config, depth, count) if regular else _expressible(config, count, kinds):
        chosen = _best_subsequence(kinds, values, wanted)
        if chosen is not None and (best is None or chosen[0] > best[0]):
            best = chosen
    kept = () if best is None else tuple(layers[place] for place in best[1])
    return kept if set(fixed) <= set(kept) else ()


def count_removable(config: Config, depth: int, layers: Sequence[int]) -> list[int]:
    """Of how many of these layers a removal exists that the config's cadences can express."""
    kinds = _kinds(config, depth, layers)
    return [count for count in range(1, len(layers)) if next(_expressible(config, len(layers) - count, kinds), None) is not None]


def _kinds(config: Config, depth: int, layers: Sequence[int], *, includes_lists: bool = False) -> list[tuple[object, ...]]:
    """What cadences say of these layers; `includes_lists`: and what the config lists of them."""
    cadences = cadences_of(config) if includes_lists else strict_cadences_of(config)
    says: list[Sequence[object]] = [cadence.read(config, depth) for cadence in cadences]
    if includes_lists:
        says += [config[field] for field in LISTED if isinstance(config.get(field), list) and len(config[field]) == depth]
        if isinstance(config.get("moe_layers"), list):
            says.append([layer in config["moe_layers"] for layer in range(depth)])
    return [tuple(of[layer] for of in says) for layer in layers]


def _regular(config: Config, depth: int, count: int) -> Iterator[list[tuple[object, ...]]]:
    """The kinds of `count` layers that go on as those of the whole model start."""
    period = find_period(config, depth)
    if period is not None:
        kinds = _kinds(config, depth, range(period), includes_lists=True)
        yield [kinds[place % period] for place in range(count)]


def _expressible(config: Config, count: int, kinds: Sequence[tuple[object, ...]]) -> Iterator[list[tuple[object, ...]]]:
    """Kinds that a config can give to `count` layers, where layers of those kinds are there in that order."""
    choices: list[list[Marks]] = []
    for number, cadence in enumerate(strict_cadences_of(config)):
        there = [values[number] for values in kinds]
        choices.append([marks for marks in cadence.possible(count) if _is_subsequence(marks, there)])
    for patterns in product(*choices):
        wanted: list[tuple[object, ...]] = list(zip(*patterns, strict=True)) if patterns else [()] * count
        if _is_subsequence(wanted, kinds):
            yield wanted


def _is_subsequence(wanted: Sequence[object], there: Sequence[object]) -> bool:
    rest = iter(there)
    return all(item in rest for item in wanted)


def _best_subsequence(
    kinds: Sequence[tuple[object, ...]], values: Sequence[float], wanted: Sequence[tuple[object, ...]]
) -> tuple[float, tuple[int, ...]] | None:
    """Places, in order, whose kinds are `wanted` and whose values have the largest sum, by dynamic programming."""
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] + [None] * len(wanted)
    for place, (role, value) in enumerate(zip(kinds, values, strict=True)):
        for length in range(min(place + 1, len(wanted)), 0, -1):
            before = best[length - 1]
            if before is not None and wanted[length - 1] == role:
                candidate = (before[0] + value, (*before[1], place))
                current = best[length]
                if current is None or candidate[0] > current[0]:
                    best[length] = candidate
    return best[-1]
