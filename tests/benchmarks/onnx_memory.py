"""What an ONNX export holds in memory: `python tests/benchmarks/onnx_memory.py WORK_FOLDER [--megabytes 1000] [--dtype bfloat16]`.

Makes a random Llama of that size on disk, exports it as fp32, and samples what all processes of the run have resident (proportional
set size: pages that several share count once). Prints the peak, and the peak over the weights' fp32 bytes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: export
    with: {format: onnx, to: OUT}
"""


def make_checkpoint(folder: Path, size: int, dtype: str) -> int:
    """Write a Llama of about `size` bytes; returns its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER

    width, words, item = 1024, 2048, 4 if dtype == "float32" else 2
    each = 4 * width * width + 3 * width * 2816
    layers = max(1, round((size / item - 2 * width * words) / each))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16, vocab_size=words
    )
    torch.set_default_dtype(getattr(torch, dtype))
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for file in BUILTIN_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure_peak(command: list[str], folder: Path) -> tuple[dict[str, int], float]:
    """Peak bytes of all processes together, in all and of memory that is not a file's; and seconds."""
    import psutil

    started, peak = time.monotonic(), {"resident": 0, "own": 0}
    process = subprocess.Popen(command, cwd=folder)
    whole = psutil.Process(process.pid)
    while process.poll() is None:
        now = {"resident": 0, "own": 0}
        for part in [whole, *whole.children(recursive=True)]:
            try:
                rows = Path(f"/proc/{part.pid}/smaps_rollup").read_text().splitlines()
            except (OSError, psutil.Error):
                continue
            sizes = {row.split(":")[0]: int(row.split()[1]) << 10 for row in rows[1:]}
            now["resident"] += sizes.get("Pss", 0)
            now["own"] += sizes.get("Pss_Anon", 0)
        peak = {name: max(peak[name], size) for name, size in now.items()}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"gradmap ended with code {process.returncode}")
    return peak, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the memory of an ONNX export.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000, help="of the checkpoint on disk")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the checkpoint")
    arguments = parser.parse_args()

    name = f"llama-{arguments.megabytes}-{arguments.dtype}"
    model = arguments.folder / name
    if not model.exists():
        size = f"{arguments.megabytes} * 10**6, {arguments.dtype!r}"
        code = f"import onnx_memory as m; m.make_checkpoint(m.Path({str(model)!r}), {size})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    parameters = (model / "model.safetensors").stat().st_size // (4 if arguments.dtype == "float32" else 2)
    out = arguments.folder / "out"
    (arguments.folder / "recipe.yaml").write_text(RECIPE.replace("MODEL", name).replace("OUT", str(out)))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "gradmap_pipeline", "run", "recipe.yaml", "--store", "store", "--threads", "1"]
    shutil.rmtree(arguments.folder / "store", ignore_errors=True)
    peak, seconds = measure_peak(command, arguments.folder)
    weights = 4 * parameters
    print(f"{parameters / 1e6:.0f} M parameters, {weights / 2**30:.2f} GiB as fp32; {seconds:.0f} s")
    for pages, held in peak.items():
        print(f"peak {pages}: {held / 2**30:.2f} GiB, {held / weights:.2f} of the weights")


if __name__ == "__main__":
    main()
