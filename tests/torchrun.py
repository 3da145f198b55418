"""Python in one process or several, as torchrun starts them, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(folder: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in a folder, one thread a process; killed after two minutes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
