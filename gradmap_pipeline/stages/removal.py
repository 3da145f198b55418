"""How many layers a share stands for, the same in every stage that speaks of removing layers."""

from __future__ import annotations


def count_removed(depth: int, ratio: float) -> int:
    """`ratio` of `depth` layers, rounded to the nearest whole number, at least 1."""
    return max(1, round(ratio * depth))
