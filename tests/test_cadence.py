"""Removals that a cadence can express, against trying all of them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from gradmap_pipeline.checkpoint.cadence import choose_kept, count_removable, find_period, is_regular, strict_cadences_of

JAMBA = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4}
ERNIE = {"moe_layer_interval": 2, "moe_layer_start_index": 2, "moe_layer_end_index": 7}
DEPTH = 9
IMPORTANCE = dict(enumerate([9.0, 4, 1, 6, 2, 3, 8, 5, 7]))


def kinds_of(config: dict[str, Any], depth: int) -> list[tuple[bool, ...]]:
    """By the formulas of the two architectures' own code."""
    if "attn_layer_period" in config:
        return [
            (
                layer % config["attn_layer_period"] == config["attn_layer_offset"],
                layer % config["expert_layer_period"] == config["expert_layer_offset"],
            )
            for layer in range(depth)
        ]
    return [
        (
            (layer + 1) % config["moe_layer_interval"] == 0
            and config["moe_layer_start_index"] <= layer <= config["moe_layer_end_index"],
        )
        for layer in range(depth)
    ]


def all_expressible(config: dict[str, Any], count: int) -> set[tuple[tuple[bool, ...], ...]]:
    """Kinds of `count` layers under any numbers, tried one by one."""
    numbers = range(DEPTH + 2)
    if "attn_layer_period" in config:
        one = {
            tuple(layer % period == offset for layer in range(count)) for period in numbers if period for offset in range(period)
        }
        return {tuple(zip(a, b, strict=True)) for a in one for b in one}
    expressible = set()
    for interval in range(1, DEPTH + 1):
        for first in numbers:
            for last in numbers:
                marks = ((layer + 1) % interval == 0 and first <= layer <= last for layer in range(count))
                expressible.add(tuple((mark,) for mark in marks))
    return expressible


@pytest.mark.parametrize("config", [JAMBA, ERNIE])
@pytest.mark.parametrize("count", [3, 5, 6, 8])
def test_the_best_of_all_selections_is_chosen(config: dict[str, Any], count: int) -> None:
    kinds, expressible = kinds_of(config, DEPTH), all_expressible(config, count)
    allowed = [kept for kept in combinations(range(DEPTH), count) if tuple(kinds[layer] for layer in kept) in expressible]
    chosen = choose_kept(config, DEPTH, count, IMPORTANCE)
    best = max((sum(IMPORTANCE[layer] for layer in kept) for kept in allowed), default=None)
    assert (sum(IMPORTANCE[layer] for layer in chosen) if chosen else None) == best
    assert not chosen or chosen in allowed
    with_ends = [kept for kept in allowed if {0, DEPTH - 1} <= set(kept)]
    fixed = choose_kept(config, DEPTH, count, IMPORTANCE, fixed=(0, DEPTH - 1))
    best = max((sum(IMPORTANCE[layer] for layer in kept) for kept in with_ends), default=None)
    assert (sum(IMPORTANCE[layer] for layer in fixed) if fixed else None) == best


@pytest.mark.parametrize("config", [JAMBA, ERNIE])
def test_counts_of_possible_removals(config: dict[str, Any]) -> None:
    kinds = kinds_of(config, DEPTH)
    expected = [
        removed
        for removed in range(1, DEPTH)
        if any(
            tuple(kinds[layer] for layer in kept) in all_expressible(config, DEPTH - removed)
            for kept in combinations(range(DEPTH), DEPTH - removed)
        )
    ]
    assert count_removable(config, DEPTH, range(DEPTH)) == expected


def test_what_is_no_cadence() -> None:
    assert strict_cadences_of({"attn_layer_period": 3, "attn_layer_offset": 1, "layers_block_type": ["hybrid"]}) == []
    assert strict_cadences_of({"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts": 4}) == []
    one_expert = {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 1}
    assert strict_cadences_of(one_expert) == []
    assert choose_kept({}, 4, 2, {0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}) == (1, 3)


WINDOWS = {"layer_types": ["sliding", "sliding", "full"] * 3}
EXPERTS = {"layer_types": ["sliding", "full"] * 4 + ["sliding"], "moe_layers": [3, 7]}
SPARSE = {"decoder_sparse_step": 2, "mlp_only_layers": [], "num_experts": 4}


@pytest.mark.parametrize(
    ("config", "period"),
    [
        (WINDOWS, 3),
        (EXPERTS, 4),
        (SPARSE, 2),
        ({**JAMBA, "no_rope_layers": [1, 1, 0] * 3}, None),
        (JAMBA, 4),
        ({"layer_types": ["conv"] * 3 + ["full"] + ["conv"] * 5}, None),
        ({"layer_types": ["full"] * 9}, 1),
        ({}, 1),
        ({"layer_types": ["short"] * 4}, 1),
    ],
)
def test_period_of_all_kinds(config: dict[str, Any], period: int | None) -> None:
    assert find_period(config, DEPTH) == period


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        (WINDOWS, lambda layer: layer % 3 == 2),
        (EXPERTS, lambda layer: (layer % 2, layer % 4 == 3)),
        (SPARSE, lambda layer: layer % 2),
        (JAMBA, lambda layer: (layer % 4 == 2, layer % 2)),
        ({}, lambda _: 0),
    ],
)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_the_best_regular_selection_is_chosen(config: dict[str, Any], formula: Any, count: int) -> None:
    allowed = [
        kept for kept in combinations(range(DEPTH), count) if all(formula(at) == formula(layer) for at, layer in enumerate(kept))
    ]
    assert [kept for kept in combinations(range(DEPTH), count) if is_regular(config, DEPTH, kept)] == allowed
    chosen = choose_kept(config, DEPTH, count, IMPORTANCE, regular=True)
    assert chosen in allowed
    assert sum(IMPORTANCE[layer] for layer in chosen) == max(sum(IMPORTANCE[layer] for layer in kept) for kept in allowed)
    fixed = choose_kept(config, DEPTH, count, IMPORTANCE, fixed=(DEPTH - 1,), regular=True)
    best = max((sum(IMPORTANCE[layer] for layer in kept) for kept in allowed if DEPTH - 1 in kept), default=None)
    assert (sum(IMPORTANCE[layer] for layer in fixed) if fixed else None) == best
