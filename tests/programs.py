"""Programs that run exported ONNX folders, each in its own environment: greedy tokens of a batch, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
TRANSFORMERS_JS = "GRADMAP_TRANSFORMERS_JS"
OLDER_PYTHON = "GRADMAP_OLDER_PYTHON"
_OLDER = ["optimum-onnx==0.1.0", "optimum==2.1.0", "transformers==4.57.6", "huggingface_hub<1", "tokenizers<0.23"]

Rows = list[list[int]]


def find_transformers_js() -> Path:
    """A folder whose node_modules hold transformers.js: named by a variable, else npm's own. Skips the test where there is none."""
    named = os.environ.get(TRANSFORMERS_JS)
    if shutil.which("node") is None:
        pytest.skip("Node is not installed: apt-get install nodejs npm")
    if named is not None:
        place = Path(named)
    else:
        root = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, check=False).stdout.strip()
        place = Path(root).parent
    if not (place / "node_modules" / "@huggingface" / "transformers").is_dir():
        pytest.skip(
            "transformers.js is not installed: npm install --prefix FOLDER @huggingface/transformers, and set "
            f"{TRANSFORMERS_JS}=FOLDER"
        )
    return place


def make_older_python(folder: Path) -> str:
    """A Python with optimum-onnx, which takes an older transformers; torch and ONNX Runtime are those of this one."""
    named = os.environ.get(OLDER_PYTHON)
    if named is not None:
        return named
    import torch

    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "zz-from-there.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *_OLDER], check=True)
    return python


def run_transformers_js(place: Path, folder: Path, ids: Rows, mask: Rows, tokens: int) -> Rows:
    return _run(["node", str(TESTS / "transformers_js.mjs"), str(place)], folder, ids, mask, tokens)


def run_optimum(python: str, folder: Path, ids: Rows, mask: Rows, tokens: int) -> Rows:
    code = (
        "import json, sys, torch; from optimum.onnxruntime import ORTModelForCausalLM\n"
        "asked = json.load(open(sys.argv[1])); model = ORTModelForCausalLM.from_pretrained(asked['folder'])\n"
        "ids, mask = torch.tensor(asked['ids']), torch.tensor(asked['mask']); tokens = asked['tokens']\n"
        "options = dict(do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)\n"
        "print(json.dumps(model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1]:].tolist()))"
    )
    return _run([python, "-c", code], folder, ids, mask, tokens)


def run_genai(folder: Path, ids: Rows, tokens: int) -> Rows:
    """ONNX Runtime GenAI, in this process. It takes no mask: padding of a graph without fused attention is not told to it."""
    import numpy as np

    genai: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")
    length = len(ids[0])
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length + tokens, min_length=length + tokens, do_sample=False, batch_size=len(ids))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[length:]] for row in range(len(ids))]


def _run(command: list[str], folder: Path, ids: Rows, mask: Rows, tokens: int) -> Rows:
    """Ask a program by a JSON file as its last argument; the last line it prints is its answer."""
    request = folder.with_name(f"{folder.name}-request.json")
    request.write_text(json.dumps({"folder": str(folder), "ids": ids, "mask": mask, "tokens": tokens}))
    done = subprocess.run([*command, str(request)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows: Rows = json.loads(done.stdout.splitlines()[-1])
    return rows
