"""An exported folder is evaluated without accelerate, which is only an extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

CODE = """
import sys
sys.modules["accelerate"] = None
from gradmap_pipeline.cli import main
main()
"""
RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: prune
    with: {layers: [1]}
  - use: export
    with: {to: out}
  - use: evaluate
    from: {model: export.exported}
    with: {dataset: {path: TEXT}, samples: 2, sequence_length: 16}
"""


def test_export_is_evaluated(tmp_path: Path, llama: Path, text: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("MODEL", str(llama)).replace("TEXT", str(text)))
    done = subprocess.run([sys.executable, "-c", CODE, "run", "r.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(line.split()[:2] == ["pruned,", "transformers"] for line in done.stdout.splitlines()), done.stdout
