"""Folders that plain transformers loads: written shard by shard, loaded back and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StageError
from ..stages.targets import describe_folder
from .folders import check_loading, write_card, write_companions

if TYPE_CHECKING:
    import torch

    from ..artifacts import ExportedFile
    from ..checkpoint.graph import ModelGraph
    from ..context import Context


def write_transformers_folder(model: ModelGraph, folder: Path, context: Context, shard_bytes: int) -> dict[str, ExportedFile]:
    """Write weights, config, tokenizer, licence and model card into an empty folder; return its files by name.

    `shard_bytes`: size of the largest weights file. Raises `StageError` where values do not fit into the type of the model.
    """
    from ..checkpoint.checkpoint import split_shards, write_folder

    tensors = model.export_tensors()
    files: dict[str, ExportedFile] = {}
    with context.progress("write weights", len(split_shards(tensors, model.dtype, shard_bytes)), "shard") as advance:
        for name, written in write_folder(tensors, folder, model.dtype, shard_bytes):
            files[name] = written
            advance()
    write_companions(model, folder)
    write_card(folder, model, context.metrics, "safetensors")
    return describe_folder(folder, files)


def check_export(model: ModelGraph, folder: Path, context: Context, shape: tuple[int, int] = (2, 48)) -> float:
    """Load the folder back; raise `StageError` unless every weight finds its place and the logits equal the model's.

    `shape`: sequences and tokens of the random text. Both run layer by layer in the exported type, so no more than a layer and the
    embeddings are in memory.
    """
    import torch

    from ..checkpoint.graph import open_folder
    from ..checkpoint.pretrained import read_config
    from ..sweep.finite import find_nonfinite_weights
    from ..sweep.sweep import open_sweep

    check_loading(folder)
    reloaded = open_folder(folder, digest_of=lambda _: "")
    stored = next(iter(model.layer_tensors(model.layers[0]).values())).torch_dtype
    dtype = model.dtype or stored

    def compute_logits(graph: ModelGraph) -> torch.Tensor:
        words = int(read_config(graph.base.folder).get_text_config().vocab_size)
        ids = torch.randint(words, shape, generator=torch.Generator().manual_seed(context.seed))
        with open_sweep(graph, (ids, torch.ones_like(ids)), context, dtype=dtype) as sweep:
            return torch.cat([logits.float() for logits in sweep.logits()])

    ours, theirs = compute_logits(model), compute_logits(reloaded)
    if not theirs.isfinite().all():
        cause = find_nonfinite_weights(model) or f"its weights are finite in {dtype}; set another 'dtype' under 'model'"
        raise StageError(f"the model computes values that are not finite: {cause}")
    difference = float((ours - theirs).abs().max())
    if not difference == 0.0:
        raise StageError(
            f"the exported folder does not compute what the model does: logits differ by {difference:.3g}; "
            "nothing was written. Please report this with the name of the model"
        )
    return difference
