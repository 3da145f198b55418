"""Write a model as a folder that other programs load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import (
    Context,
    Estimate,
    Evaluation,
    Export,
    ExportedFile,
    ModelGraph,
    OptionError,
    Rehearsal,
    Stage,
    StageError,
    Survey,
    hookimpl,
)
from gradmap_pipeline.artifacts import LINEAGE
from gradmap_pipeline.digests import sha256_of
from gradmap_pipeline.partial import partial_folder, replace_folder
from gradmap_pipeline.report.model_card import make_model_card

_CHECK_SHAPE = (2, 48)  # sequences, tokens


class ExportModel(Stage):
    """Write the model as a folder of safetensors that plain transformers loads, and check it by loading it back."""

    name = "export"

    format: Literal["safetensors"] = Field("safetensors", description="`safetensors`: a Hugging Face folder.")
    to: Path = Field(description="Folder to write.")
    overwrite: bool = Field(False, description="Replace a folder even if it is not an earlier export.")
    max_shard_gigabytes: float = Field(5.0, gt=0, description="Size of the largest weights file, in 10⁹ bytes.")

    class Inputs(BaseModel):
        model: ModelGraph
        evaluation: Evaluation | None = None

    class Outputs(BaseModel):
        exported: Export

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.to.is_file():
            raise OptionError("to", f"{str(self.to)!r} is a file; name a folder")
        above = next((folder for folder in self.to.resolve().parents if folder.exists()), self.to.resolve())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise OptionError("to", f"{str(self.to)!r} cannot be made: {str(above)!r} is not a folder that can be written to")
        foreign = find_foreign_files(self.to) if self.to.is_dir() and not self.overwrite else []
        if foreign:
            found = f"folder {str(self.to)!r} holds {foreign[0]!r}, which is not part of an export"
            raise OptionError("to", f"{found}; choose another, or set overwrite: true to delete it")
        return {}

    def inspect(self, inputs: Mapping[str, Any], survey: Survey) -> None:
        survey.check_layerwise()

    def estimate(self, inputs: Mapping[str, Any], rehearsal: Rehearsal) -> Estimate | None:
        model = inputs.get("model")
        if model is None or model.layers is None:
            return None
        size = rehearsal.count_bytes(model.layers)
        rates = rehearsal.rates
        copying = Estimate(0, size, size, seconds=size * (rates.read_again(size) + rates.digest + rates.write))
        return copying + rehearsal.forward_sweep(model.layers, *_CHECK_SHAPE, besides=size) * 2

    def writes(self) -> tuple[Path, ...]:
        return (self.to,)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        model, target = inputs.model, self.to.resolve()
        if target == model.base.folder or target in model.base.folder.parents:
            raise StageError(f"{str(self.to)!r} holds the model that is being read; export to another folder")
        with partial_folder(target) as partial:
            evaluation = inputs.evaluation if inputs.evaluation and inputs.evaluation.model == model.digest else None
            files = self._write(model, evaluation, partial, context)
            difference = check_export(model, partial, context.seed)
            lineage = make_lineage(model, evaluation, files, difference, context)
            (partial / LINEAGE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
            files[LINEAGE] = _describe(partial / LINEAGE)
            replace_folder(partial, target)
        context.note(f"wrote {self.to}: {sum(file.size for file in files.values()) / 1e6:.1f} MB, loaded back, logits equal")
        return self.Outputs(exported=Export(folder=target, format=self.format, files=files, max_logit_difference=difference))

    def _write(self, model: ModelGraph, evaluation: Evaluation | None, folder: Path, context: Context) -> dict[str, ExportedFile]:
        from gradmap_pipeline.model.architecture import prune_config
        from gradmap_pipeline.model.checkpoint import split_shards, write_folder

        config = prune_config(model.base.folder, model.layers)
        if model.dtype is not None:
            for part in (config, config.get("text_config") or {}):
                part["torch_dtype" if "torch_dtype" in part else "dtype"] = model.dtype
        tensors = model.export_tensors()
        shard_bytes = int(self.max_shard_gigabytes * 1e9)
        files: dict[str, ExportedFile] = {}
        with context.progress("write weights", len(split_shards(tensors, model.dtype, shard_bytes)), "shard") as advance:
            for name, written in write_folder(tensors, folder, model.dtype, shard_bytes):
                files[name] = written
                advance()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(make_model_card(model, evaluation), encoding="utf-8")
        for companion in model.base.companion_files():
            shutil.copyfile(companion, folder / companion.name)
        for file in folder.iterdir():
            if file.name not in files:
                files[file.name] = _describe(file)
        return files


def find_foreign_files(folder: Path) -> list[str]:
    """Names in a folder that no export wrote there."""
    try:
        lineage = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
        written = {LINEAGE, *lineage["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    return sorted(path.name for path in folder.iterdir() if path.name not in written)


def check_export(model: ModelGraph, folder: Path, seed: int) -> float:
    """Load the folder back; raise `StageError` unless every weight finds its place and the logits equal the model's.

    Both run layer by layer in the exported type, so no more than a layer and the embeddings are in memory.
    """
    import torch

    from gradmap_pipeline.memory import give_back
    from gradmap_pipeline.model.batches import make_batches
    from gradmap_pipeline.model.graph import open_folder
    from gradmap_pipeline.model.layerwise import LayerwiseModel
    from gradmap_pipeline.model.sweep import Sweep

    check_loading(folder)
    reloaded = open_folder(folder, digest_of=lambda _: "")
    stored = next(iter(model.layer_tensors(model.layers[0]).values())).torch_dtype
    dtype = model.dtype or stored

    def compute_logits(graph: ModelGraph) -> torch.Tensor:
        layerwise = LayerwiseModel(graph, dtype=dtype, resident_bytes=0)
        words = int(layerwise.module.config.get_text_config().vocab_size)
        ids = torch.randint(words, _CHECK_SHAPE, generator=torch.Generator().manual_seed(seed))
        batches = make_batches(ids, torch.ones_like(ids))
        return next(Sweep(layerwise, batches, keep_boundaries=False).logits()).float()

    found = [compute_logits(model)]
    give_back()
    found.append(compute_logits(reloaded))
    if not found[1].isfinite().all():
        raise StageError(f"the model computes values that are not finite in {dtype}; set another 'dtype' under 'model'")
    difference = float((found[0] - found[1]).abs().max())
    if not difference == 0.0:
        raise StageError(
            f"the exported folder does not compute what the model does: logits differ by {difference:.3g}; "
            "nothing was written. Please report this with the name of the model"
        )
    return difference


def check_loading(folder: Path) -> None:
    """Raise `StageError` when transformers finds weights missing, left over or of another shape. Weights stay on disk, mapped."""
    import transformers
    from transformers.utils import logging

    from gradmap_pipeline.model.source import load_config

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        named = (load_config(folder).get("architectures") or [""])[0]
        whole = getattr(transformers, named, transformers.AutoModelForCausalLM)  # with the parts besides the text decoder
        _, report = whole.from_pretrained(folder, dtype="auto", output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise StageError(f"the exported folder does not load: {kind.replace('_', ' ')} {sorted(map(str, report[kind]))[:5]}")


def make_lineage(
    model: ModelGraph, evaluation: Evaluation | None, files: dict[str, ExportedFile], difference: float, context: Context
) -> dict[str, Any]:
    """How the folder came to be, for machines."""
    return {
        "made_by": f"gradmap-pipeline {version('gradmap-pipeline')}",
        "versions": {library: version(library) for library in ("torch", "transformers", "safetensors")},
        "base": {"name": model.base.name, "sha256": model.base.sha256, "layers": model.base.layers},
        "layers_kept": model.layers,
        "layers_removed": model.removed,
        "patched": {name: file.sha256 for name, file in model.patches.items()},
        "steps": [{"id": s.id, "stage": s.stage, "options": s.options, "outputs": s.outputs} for s in context.lineage],
        "evaluation": evaluation.model_dump(mode="json") if evaluation else None,
        "max_logit_difference": difference,
        "files": {name: file.model_dump() for name, file in sorted(files.items())},
    }


def _describe(file: Path) -> ExportedFile:
    return ExportedFile(size=file.stat().st_size, sha256=sha256_of(file))


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [ExportModel]
