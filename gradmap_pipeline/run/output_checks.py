"""What a stage returns, checked where that costs a run little: JSON, files, their digests, and the tensors that it replaces."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from ..artifacts import Artifact, TensorFile
from ..checkpoint.checkpoint import read_chunks, read_header
from ..checkpoint.graph import ModelGraph
from ..checkpoint.model import Model
from ..errors import ModelError, StageError
from ..export.exports import Export
from ..machine.digests import sha256_of
from .measured import read_metrics


def dump_outputs(outputs: BaseModel, store: Path | None = None) -> str:
    """JSON of a stage's outputs, with paths relative to a store. Raises `StageError` unless it gives the same outputs again."""
    context = None if store is None else {"store": store}
    try:
        dumped = json.dumps(outputs.model_dump(mode="json", context=context), allow_nan=False)
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StageError(f"its outputs cannot be stored: {line}") from error
    try:
        again = type(outputs).model_validate(json.loads(dumped), context=context)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise StageError(f"its outputs cannot be stored: {place} cannot be read back ({detail['msg']})") from error
    for name in type(outputs).model_fields:
        if getattr(again, name) != getattr(outputs, name):
            change = f"{getattr(outputs, name)!r} would be read back as {getattr(again, name)!r}"
            raise StageError(f"its outputs cannot be stored: {name!r} changes on the way, {change}")
    return dumped


def find_output_faults(outputs: BaseModel, inputs: BaseModel, folder: Path, writes: Collection[Path]) -> Iterator[str]:
    """Say what is wrong with the outputs of a stage, one line for each fault, in words that its author can act on.

    `folder`: of the step. `writes`: files and folders outside of it that the stage says it writes.
    """
    given = dict(pair for artifact in _artifacts_of(inputs).values() for pair in artifact.files_by_path().items())
    places = (folder, *(place.resolve() for place in writes))
    known = {file.path for graph in _graphs_of(inputs) for file in graph.patches.values()}
    for name, artifact in _artifacts_of(outputs).items():
        for path, digest in artifact.files_by_path().items():
            if given.get(path) != digest:
                yield from _check_file(name, path, digest, folder, places)
    for graph in _graphs_of(outputs):
        for tensor, file in graph.patches.items():
            if file.path not in known and file.path.is_file():
                yield from _check_patch(graph, tensor, file)
    yield from _check_metrics(outputs, inputs)


def _check_metrics(outputs: BaseModel, inputs: BaseModel) -> Iterator[str]:
    """Whether each metric is told apart from the others, and is of a model that the stage takes or gives."""
    try:
        metrics = read_metrics(_artifacts_of(outputs))
    except StageError as error:
        yield str(error)
        return
    artifacts = [artifact for fields in (inputs, outputs) for artifact in _artifacts_of(fields).values()]
    known = {artifact.digest for artifact in artifacts if isinstance(artifact, Model | Export)}
    known |= {str(getattr(artifact, "model", "")) for artifact in _artifacts_of(inputs).values()}
    known |= {graph.digest for fields in (inputs, outputs) for one in _graphs_of(fields) for graph in (one, one.dense)}
    for metric in metrics:
        if metric.model not in known:
            advice = "give the digest of a model that it takes or gives, as inputs.model.digest"
            yield f"it gives the metric {metric.title!r} of a model {metric.model[:12]!r}, which nobody knows; {advice}"


def _check_file(output: str, path: Path, digest: str, folder: Path, places: Collection[Path]) -> Iterator[str]:
    if not any(path.resolve().is_relative_to(place.resolve()) for place in places):
        yield (
            f"its output {output!r} has the file {str(path)!r}, which lies outside the step's folder; write it to context.folder, "
            "or name its place in writes()"
        )
    elif not path.is_file():
        named = path.relative_to(folder) if path.is_relative_to(folder) else path
        yield f"its output {output!r} has the file {str(named)!r}, which is not there; write it before run() returns"
    elif path.is_relative_to(folder) and sha256_of(path) != digest:
        yield f"its output file {path.name!r} is not what its digest says; write a file before it is hashed"


def _check_patch(graph: ModelGraph, tensor: str, file: TensorFile) -> Iterator[str]:
    """Whether the new value of a tensor fits the one it replaces: shape, type, finite numbers."""
    base = graph.base.tensors.get(tensor)
    if base is None:
        yield f"it replaces {tensor!r}, and the base checkpoint has no tensor of that name"
        return
    try:
        stored = read_header(file.path).get(tensor)
    except ModelError as error:
        yield f"it replaces {tensor!r} by a file that cannot be read: {error}"
        return
    if stored is None:
        yield f"it replaces {tensor!r} by the file {file.path.name!r}, which has no tensor of that name"
    elif stored.shape != base.shape:
        yield f"it replaces {tensor!r} of shape {base.shape} by one of shape {stored.shape}; keep the shape"
    elif stored.torch_dtype != base.torch_dtype:
        yield f"it replaces {tensor!r} of type {base.torch_dtype} by one of type {stored.torch_dtype}; convert it before saving"
    elif stored.is_float and (bad := sum(int((~chunk.isfinite()).sum()) for chunk in read_chunks(stored))):
        yield f"it replaces {tensor!r} by values of which {bad:,} are not finite"


def _artifacts_of(fields: BaseModel) -> dict[str, Artifact]:
    values = {name: getattr(fields, name) for name in type(fields).model_fields}
    return {name: value for name, value in values.items() if isinstance(value, Artifact)}


def _graphs_of(fields: BaseModel) -> Iterator[ModelGraph]:
    for artifact in _artifacts_of(fields).values():
        if isinstance(artifact, ModelGraph):
            yield artifact
        elif isinstance(artifact, Export):
            yield artifact.graph
