"""What a step says that does not fit its memory: how much would be enough, and only what can be done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_memory_plan import NEEDS

from gradmap_pipeline.errors import CapacityError
from gradmap_pipeline.machine.memory import parse_size
from gradmap_pipeline.machine.memory_advice import lack_of_memory, round_up, tell_shortage
from gradmap_pipeline.sweep.memory_plan import plan_sweep

GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "text"),
    [(1, "0.1MiB"), (130 << 20, "130MiB"), (GIB // 4, "0.25GiB"), (GIB // 2 + 1, "0.51GiB"), (5 * GIB // 4, "1.3GiB"),
     (12 * GIB + 1, "13GiB"), (20 * GIB, "20GiB"), (101 * GIB, "110GiB")],
)  # fmt: skip
def test_amounts_are_rounded_up_to_two_digits(size: int, text: str) -> None:
    assert round_up(size) == text
    assert parse_size(text) >= size


def test_a_narrower_type_is_advised_where_there_is_one() -> None:
    assert str(lack_of_memory("too large", GIB, dtype="float32")) == (
        "too large; use --dtype bfloat16, or allow 1.2GiB or more with --memory"
    )
    assert str(lack_of_memory("too large", GIB, dtype="bfloat16")) == "too large; allow 1.2GiB or more with --memory"


def test_options_are_advised_where_the_stage_has_them() -> None:
    error = lack_of_memory("large; too large", GIB, by_option={"sequence_length": "shorten 'sequence_length'"})
    assert tell_shortage(error, ["to"]) == "large; too large; allow 1.2GiB or more with --memory"
    assert tell_shortage(error, ["sequence_length"]) == (
        "large; too large; shorten 'sequence_length', or allow 1.2GiB or more with --memory"
    )
    wide = lack_of_memory("too large", GIB, dtype="float32", by_option={"a": "lower 'a'"})
    assert tell_shortage(wide, ["a"]) == "too large; lower 'a', use --dtype bfloat16, or allow 1.2GiB or more with --memory"


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_the_amount_that_a_sweep_names_is_enough(item_bytes: int) -> None:
    held = 3 * GIB // 8
    needs = replace(NEEDS, item_bytes=item_bytes)
    with pytest.raises(CapacityError, match=f"{needs.tokens} tokens at a time takes .* over the 0.50 GiB allowed") as caught:
        plan_sweep(needs, GIB // 2 - held, held=held)
    assert ("bfloat16" in str(caught.value)) == (item_bytes == 4)
    named = parse_size(str(caught.value).partition("allow ")[2].partition(" or")[0])
    plan = plan_sweep(needs, named - held, held=held)
    assert plan.peak_bytes <= named - held
    with pytest.raises(CapacityError):
        plan_sweep(needs, (named - held) * 3 // 4, held=held)
