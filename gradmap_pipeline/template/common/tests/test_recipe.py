"""The recipe runs to its end, and the stage is one of its steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipe.yaml"


def test_recipe_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gradmap_pipeline", "run", str(RECIPE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "stage_name: done" in done.stdout + done.stderr
