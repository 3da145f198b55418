"""What every exported folder has besides its weights: config, tokenizer, model card, and how it came to be."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..artifacts import LINEAGE, ExportedFile
from ..context import Context, FinishedStep
from ..errors import StageError
from ..text import without_places
from .exports import WEIGHTS, load_folder
from .model_card import Holding, make_model_card, select_metrics

if TYPE_CHECKING:
    from ..checkpoint.graph import ModelGraph
    from ..metrics import Metric
    from ..stages.stage import Stage
    from .card_usage import Format


def write_companions(model: ModelGraph, folder: Path) -> None:
    """Write a model's config, tokenizer and licence. Raises `StageError` unless the tokenizer gives what the base's does."""
    from ..checkpoint.architecture import prune_config
    from ..checkpoint.companions import CODE_KEY, copy_companions
    from ..checkpoint.infinities import to_json
    from ..checkpoint.older import add_older_rope
    from ..checkpoint.older_tokenizer import add_older_tokenizer
    from ..checkpoint.tokenizer_check import TEXTS, check_tokenizer_copy
    from ..checkpoint.tying import has_own_head, untie

    config = prune_config(model.base.folder, model.layers)
    config = add_older_rope(model.base.folder, config)
    config.pop(CODE_KEY, None)
    if has_own_head(model):
        untie(config)
    if model.dtype is not None:
        for part in (config, config.get("text_config") or {}):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = model.dtype
    (folder / "config.json").write_text(to_json(config, model.base.folder), encoding="utf-8")
    copy_companions(model.base.folder, folder)
    add_older_tokenizer(folder, TEXTS)
    check_tokenizer_copy(model.base.folder, folder)


def explain_config(model: ModelGraph, *, with_types: bool = True) -> list[str]:
    """What to say of an export's config: what it lacks, what differs from the base's, and where it does not fit the weights.

    `with_types`: whether the weights are in the types of the model.
    """
    from ..checkpoint.companions import describe_left_out
    from ..checkpoint.pretrained import name_generative_class
    from ..checkpoint.source import load_config
    from ..checkpoint.tying import TIE_KEY, has_own_head

    lines = [describe_left_out(model.base.folder), _explain_types(model) if with_types else None]
    generative = name_generative_class(model.base.folder)
    if generative is not None:
        named = load_config(model.base.folder)["architectures"][0]
        lines.append(f"config.json of the model names the class {named}; the export's names {generative}, which it is")
    if has_own_head(model):
        lines.append(
            f"config.json of the model says `{TIE_KEY}: true`, and its checkpoint holds a head that differs from the embeddings; "
            "the export's says false, so that no program drops the head"
        )
    return [line for line in lines if line is not None]


def _explain_types(model: ModelGraph) -> str | None:
    """What to say where config.json names another type than most weights are stored in; None where they agree."""
    from ..checkpoint.source import load_config, text_config

    config = load_config(model.base.folder)
    places = (text_config(config), config)
    named = next((part[key] for part in places for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)), None)
    elements: Counter[str] = Counter()
    for tensor in model.export_tensors().values():
        if tensor.is_float:
            elements[tensor.torch_dtype] += tensor.elements
    stored = elements.most_common(1)[0][0] if elements else None
    if model.dtype is not None or named in (None, "auto", stored):
        return None
    return (
        f"config.json says {named}, and the weights are stored in {stored}: programs that go by the config convert them; set "
        "'dtype' under 'model' to write both alike"
    )


def write_card(
    folder: Path,
    model: ModelGraph,
    metrics: Sequence[Metric],
    form: Format,
    quantisation: str | None = None,
    details: tuple[str, ...] = (),
) -> None:
    """The model card of a folder that has its weights: sizes are those of the files there. It has those of
    `metrics` that are of the model or of the unpruned one."""
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*"))}
    sizes = {name: file.stat().st_size for name, file in files.items() if name.endswith(WEIGHTS)}
    deviations = tuple(find_deviations(model, form))
    card = make_model_card(model, metrics, Holding(form, sizes, quantisation, details, deviations, _is_chat(folder)))
    (folder / "README.md").write_text(card, encoding="utf-8")


def find_deviations(model: ModelGraph, form: Format) -> list[str]:
    """How what programs compute from a folder of this format differs from the model, a line each."""
    from ..checkpoint.architecture import full_config
    from ..checkpoint.depth import prune_fields
    from .consumers import explain_removal
    from .llamacpp.limits import explain_deviations

    if form == "onnx":
        return []
    config = full_config(model.base.folder)
    return (
        explain_deviations(prune_fields(config, config, model.layers)) if form == "gguf" else explain_removal(config, model.layers)
    )


def make_lineage(
    model: ModelGraph,
    files: dict[str, ExportedFile],
    difference: float | None,
    stage: Stage,
    context: Context,
) -> dict[str, Any]:
    """How the folder came to be, for machines. `stage`: the one that writes it."""
    return {
        "made_by": f"gradmap-pipeline {__version__}",
        **(context.provenance or {}),
        "versions": {library: version(library) for library in ("torch", "transformers", "safetensors")},
        "base": without_places(describe_base(model)),
        "model": {
            "label": model.label,
            "parameters": model.count_parameters(),
            "bytes": _count_weights(files),
        },
        "layers_kept": model.layers,
        "layers_removed": model.removed,
        "patched": {name: file.sha256 for name, file in model.patches.items()},
        "steps": _list_steps(stage, context),
        "metrics": _dump_metrics(model, context.metrics),
        "base_metrics": _dump_metrics(model.dense, context.metrics),
        "max_logit_difference": difference,
        "files": {name: file.model_dump() for name, file in sorted(files.items())},
    }


def describe_base(model: ModelGraph) -> dict[str, Any]:
    """The unpruned model that a model was made from, for machines; `bytes` are those of its weights."""
    dense = model.dense
    described = {"name": model.base.name, "sha256": model.base.sha256, "layers": model.base.layers}
    return described | {"parameters": dense.count_parameters(), "bytes": dense.size_bytes}


def check_loading(folder: Path) -> None:
    """Raise `StageError` when transformers finds weights missing, left over or of another shape. Weights stay on disk, mapped."""
    _, report = load_folder(folder, is_whole=True, output_loading_info=True)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[fault]:
            raise StageError(f"the exported folder does not load: {fault.replace('_', ' ')} {sorted(map(str, report[fault]))[:5]}")


def extend_lineage(
    source: Path, files: dict[str, ExportedFile], difference: float | None, stage: Stage, context: Context
) -> dict[str, Any]:
    """The lineage of a folder that a stage makes from another export: that of the export, with the steps that led here."""
    lineage = _read_lineage(source)
    lineage |= context.provenance or {}
    lineage |= {"steps": _list_steps(stage, context), "max_logit_difference": difference}
    if isinstance(lineage.get("model"), dict):  # exports of earlier versions do not say
        lineage["model"]["bytes"] = _count_weights(files)
    return lineage | {"files": {name: file.model_dump() for name, file in sorted(files.items())}}


def _count_weights(files: Mapping[str, ExportedFile]) -> int:
    """Bytes of the files that hold weights."""
    return sum(file.size for name, file in files.items() if name.endswith(WEIGHTS))


def _dump_metrics(model: ModelGraph, metrics: Sequence[Metric]) -> list[Any]:
    return [without_places(metric.model_dump()) for metric in select_metrics(model, metrics)]


def _is_chat(folder: Path) -> bool:
    """Whether the tokenizer has a template for chats."""
    settings = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _read_lineage(folder: Path) -> dict[str, Any]:
    lineage: dict[str, Any] = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    return lineage


def _list_steps(stage: Stage, context: Context) -> list[dict[str, Any]]:
    """The steps that led here, and this one last, whose outputs are the folder itself."""
    this = FinishedStep(context.step or stage.name, stage.name, list_options(stage), {})
    return [without_places(vars(step)) for step in (*context.lineage, this)]


def list_options(stage: Stage) -> dict[str, Any]:
    """JSON of a stage's options, but for where it writes, which says nothing elsewhere."""
    written = stage.writes()
    places = {name for name, value in stage if isinstance(value, Path) and value in written}
    return {name: value for name, value in stage.model_dump(mode="json", by_alias=True).items() if name not in places}
