"""Sizes as people write them, and what the machine has."""

from __future__ import annotations

import mmap
import subprocess
import sys
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


def test_processes_share_the_memory_of_the_machine() -> None:
    both = ProcessGroup(rank=0, size=2)
    assert Machine().budget("cpu", both) == pytest.approx(default_budget() / 2, rel=0.1)
    assert Machine(memory=70).budget("cpu", both) == 70


def test_on_a_gpu_its_memory_counts() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    torch.cuda.empty_cache()
    size = 512 << 20
    held, free = resident_bytes("cuda:0"), free_bytes("cuda:0")
    block = torch.empty(size, dtype=torch.uint8, device="cuda:0")
    assert resident_bytes("cuda:0") - held == pytest.approx(size, rel=0.1)
    assert free - free_bytes("cuda:0") > size // 2, "others may use this GPU, too"
    total = torch.cuda.get_device_properties(0).total_memory
    assert size < default_budget("cuda:0") < total
    both = ProcessGroup(rank=0, size=2)
    assert Machine().budget("cuda:0", both) == pytest.approx(default_budget("cuda:0"), rel=0.1), "each has a GPU of its own"
    assert Machine(memory=70).budget("cuda:0", both) == 70
    del block


BLOCKS = """
import resource, torch
from gradmap_pipeline.machine.memory import give_back, keep_blocks, tune_allocator

def pages(size, times=50):
    torch.ones(size, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(size, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 // size

tune_allocator(is_tight=IS_TIGHT)
got = [pages(4 << 20)]
keep_blocks()
got += [pages(4 << 20)]
give_back(between_steps=True)
got += [pages(8 << 20)]  # which no block that was kept has room for
keep_blocks()
keep_blocks(keep=False)
print(*got, pages(8 << 20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="thresholds of the GNU C library")
@pytest.mark.parametrize("is_tight", [True, False])
def test_blocks_are_kept_where_memory_is_not_tight_or_a_step_has_room(is_tight: bool) -> None:
    code = BLOCKS.replace("IS_TIGHT", str(is_tight))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    returned = [int(times) > 40 for times in done.stdout.split()]  # of 50 blocks
    assert returned == ([True, False, True, True] if is_tight else [False] * 4), done.stdout
