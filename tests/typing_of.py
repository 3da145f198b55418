"""Have mypy look at files as `make lint` looks at the package, and share what it knows of the libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def check_types(files: Sequence[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """mypy on files that lie in a folder, by their names there."""
    names = [str(file.relative_to(folder)) for file in files]
    options = ["--strict", f"--config-file={ROOT / 'pyproject.toml'}", f"--cache-dir={ROOT / '.mypy_cache'}"]
    command = [sys.executable, "-m", "mypy", *options, *names]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
