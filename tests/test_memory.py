"""Sizes as people write them, and what the machine has."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from gradmap_pipeline.machine import memory
from gradmap_pipeline.machine.distributed import ProcessGroup
from gradmap_pipeline.machine.machine import Machine
from gradmap_pipeline.machine.memory import default_budget, free_bytes, parse_size, resident_bytes


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


@pytest.mark.parametrize(
    ("folder", "limit", "used", "unlimited"),
    [("", "memory.max", "memory.current", "max"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", str(2**63 - 4096))],
    ids=["version 2", "version 1"],
)
def test_control_group_limits_the_default(
    folder: str, limit: str, used: str, unlimited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used counts without the files that the kernel would give up."""
    lines = Path("/proc/self/cgroup").read_text()
    if not any(line.split(":")[1] == folder for line in lines.splitlines()):
        pytest.skip(f"this machine has no control groups of {folder or 'version 2'}")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / limit).write_text("1000000\n")
    (group / used).write_text("500000\n")
    (group / "memory.stat").write_text("cache 200000\ninactive_file 100000\n")
    assert free_bytes() == 600_000
    assert default_budget() == pytest.approx(480_000 + resident_bytes(), abs=16 << 20)
    (group / limit).write_text(unlimited + "\n")
    assert default_budget() > 64 << 20


def test_on_a_gpu_its_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    assert resident_bytes("cuda:0") == 300
    assert default_budget("cuda:0") == 1100
    both = ProcessGroup(rank=0, size=2)
    assert Machine().budget("cuda:0", both) == 1100
    assert Machine(memory=70).budget("cuda:0", both) == 70
    assert Machine().budget("cpu", both) < Machine().budget("cpu")
