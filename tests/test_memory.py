"""Sizes as people write them, and what the machine has."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from gradmap_pipeline import memory
from gradmap_pipeline.memory import default_budget, parse_size, resident_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("3GiB", 3 * 2**30), ("512M", 512 * 2**20), ("2.5 GB", 2_500_000_000), ("1tib", 2**40), ("4096", 4096), ("10 kB", 10_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "3 GiB of it", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"accepted: a size such as 3GiB, 512MiB or 2\.5GB"):
        parse_size(text)


def test_resident_memory_counts_what_is_allocated() -> None:
    before = resident_bytes()
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes(64 << 20))
        assert resident_bytes() - before > 60 << 20


def test_control_group_limits_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert default_budget() == pytest.approx(480_000 + resident_bytes(), abs=16 << 20)
    (tmp_path / "memory.max").write_text("max\n")
    assert default_budget() > 64 << 20
