"""A checkpoint with Llama-2-7B's shapes through a whole recipe in a few GiB: `python tests/benchmarks/llama_7b.py WORK_FOLDER`.

Weights are random, in bf16, sharded as Hugging Face shards them (13.5 GB). Prints seconds, bytes read and peak resident memory of
each step. Needs 30 GB of disk in WORK_FOLDER, and keeps the checkpoint there for another time. `--layers`: of fewer.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from plan_against_run import compare

RECIPE = """\
version: 1
model: {path: MODEL}
steps:
  - use: evaluate
    id: evaluate_dense
    with: {dataset: {builtin: heldout}, samples: SAMPLES, sequence_length: LENGTH}
  - use: calibrate
    with: {dataset: {builtin: calibration}, samples: SAMPLES, sequence_length: LENGTH}
  - use: gradmap_score
    with: {layers: REMOVED}
  - use: prune
    with: {layers: REMOVED}
  - use: project_compensate
    with: {site: SITE}
  - use: evaluate
    with: {dataset: {builtin: heldout}, samples: SAMPLES, sequence_length: LENGTH}
  - use: export
    with: {to: out}
"""


def make_checkpoint(folder: Path, layers: int) -> None:
    """So many layers of Llama-2-7B's shapes in shards of at most 5 GB, one tensor in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from gradmap_pipeline.checkpoint.checkpoint import StoredTensor, read_header, split_shards, write_folder
    from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    for file in BUILTIN_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        **{f"self_attn.{name}_proj": (d, d) for name in "qkvo"},
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    shapes |= {f"model.layers.{n}.{name}.weight": shape for n in range(config.num_hidden_layers) for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (v, d)}
    generator = torch.Generator().manual_seed(0)
    parts = folder / "parts"
    stored: dict[str, StoredTensor] = {}
    parts.mkdir()
    for name, shape in shapes.items():
        tensor = (
            torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) if len(shape) == 2 else torch.ones(shape)
        )
        save_file({name: tensor.bfloat16()}, parts / f"{name}.safetensors")
        stored |= read_header(parts / f"{name}.safetensors")
    assert layers < 32 or len(split_shards(stored, None, 5_000_000_000)) == 3
    for _ in write_folder(stored, folder):
        pass
    shutil.rmtree(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--removed", type=int, default=2)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--site", default="largest_shift")
    arguments = parser.parse_args()
    model = arguments.folder / f"llama-7b-{arguments.layers}-layers"
    if not (model / "config.json").is_file() or (model / "parts").exists():
        started = time.monotonic()
        shutil.rmtree(model, ignore_errors=True)
        make_checkpoint(model, arguments.layers)
        print(f"made the checkpoint in {time.monotonic() - started:.0f} s")
    recipe = RECIPE.replace("MODEL", model.name).replace("REMOVED", str(arguments.removed)).replace("SITE", arguments.site)
    recipe = recipe.replace("SAMPLES", str(arguments.samples)).replace("LENGTH", str(arguments.length))
    (arguments.folder / "recipe.yaml").write_text(recipe)
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)  # an export that is there is read before it is replaced
    compare(arguments.folder, arguments.folder / "recipe.yaml", ["--memory", arguments.memory, "--dtype", "bfloat16"])


if __name__ == "__main__":
    main()
