"""ModelGraph: a model as layers kept and tensors patched over a base checkpoint. Nothing is copied until export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from ..artifacts import StoredPath, TensorFile
from ..errors import ModelError
from ..machine.digests import sha256_of, sha256_of_value
from .architecture import find_layer_prefix, layer_of
from .checkpoint import StoredTensor, read_folder, read_header
from .companions import find_companions, find_tokenizer_files
from .depth import BEYOND_TOP
from .files import check_folder
from .model import Model
from .sizes import check_sizes
from .source import ModelSource, count_layers, count_positions, load_config, text_config

if TYPE_CHECKING:
    import torch

    from ..batches import Batch

LONGEST_DEFAULT_SEQUENCE = 2048


class BaseCheckpoint(BaseModel):
    """A folder of safetensors and config, as its author left it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: StoredPath
    name: str
    """The name that the recipe has for it."""
    sha256: str
    """Digest of all files that make the model: weights, config, tokenizer."""
    layers: int
    from_hub: bool = False
    """Whether `name` is that of a model on the Hugging Face hub."""

    @model_serializer(mode="wrap")
    def _leave_out_place(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        return {"sha256": self.sha256} if (info.context or {}).get("content_only") else serialize(self)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor on disk, by its name there."""
        return read_folder(self.folder)

    @cached_property
    def layer_prefix(self) -> str:
        """What the names of layer tensors start with on disk: `model.layers`."""
        beyond = (text_config(load_config(self.folder)).get(field) for field in BEYOND_TOP)
        return find_layer_prefix(self.tensors, self.layers, sum(count for count in beyond if isinstance(count, int)))

    @cached_property
    def names_by_layer(self) -> dict[int | None, tuple[str, ...]]:
        """Names of the tensors of each layer, in the order of the file; under None those that belong to no layer."""
        names: dict[int | None, list[str]] = {}
        for name in self.tensors:
            names.setdefault(layer_of(name, self.layer_prefix), []).append(name)
        return {layer: tuple(found) for layer, found in names.items()}

    @property
    def default_sequence_length(self) -> int:
        """Tokens that the model is made for, at most 2048."""
        return min(count_positions(load_config(self.folder)) or LONGEST_DEFAULT_SEQUENCE, LONGEST_DEFAULT_SEQUENCE)

    def companion_files(self) -> list[Path]:
        """Files besides weights and config.json that belong to the model: tokenizer, generation config, licence."""
        return find_companions(self.folder)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Digest of all that turns text into ids: files, and what config.json says of the tokenizer."""
        files = {file.relative_to(self.folder).as_posix(): sha256_of(file) for file in find_tokenizer_files(self.folder)}
        config = load_config(self.folder)
        return sha256_of_value([files, config.get("model_type"), config.get("tokenizer_class")])


class ModelGraph(Model):
    """A causal LM: the layers kept, in order, and the tensors replaced, over a base checkpoint."""

    computes_graph = True

    base: BaseCheckpoint
    layers: tuple[int, ...]
    """Base layers kept."""
    patches: dict[str, TensorFile] = Field(default_factory=dict)
    """Tensors that replace the base's, by their name in the base checkpoint; each file holds it under that name."""
    dtype: str | None = None
    """Floating-point type of exported weights; None: as stored."""
    label: str = "dense"
    """What was done last, for tables: dense, pruned, compensated."""

    @property
    def graph(self) -> ModelGraph:
        """Itself."""
        return self

    @property
    def dense(self) -> ModelGraph:
        """The base model, whole."""
        return ModelGraph(base=self.base, layers=tuple(range(self.base.layers)), dtype=self.dtype)

    @property
    def removed(self) -> tuple[int, ...]:
        """Base layers left out."""
        return tuple(sorted(set(range(self.base.layers)) - set(self.layers)))

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        """The whole model in float32; `evaluate` and the rankings read one layer at a time instead."""
        from .whole import compute_logits, load_whole

        return compute_logits(load_whole(self, "float32", device), device)

    def without_layers(self, removed: Collection[int], label: str = "pruned") -> ModelGraph:
        """Leave out base layers; patches of theirs go with them."""
        unknown = sorted(set(removed) - set(self.layers))
        if unknown:
            raise ModelError(f"layer {unknown[0]} cannot be removed: the model has layers {list(self.layers)}")
        kept = tuple(layer for layer in self.layers if layer not in removed)
        if not kept:
            raise ModelError(f"removing {len(removed)} of {len(self.layers)} layers leaves none")
        patches = {n: f for n, f in self.patches.items() if layer_of(n, self.base.layer_prefix) in (None, *kept)}
        return self.model_copy(update={"layers": kept, "patches": patches, "label": label})

    def with_patches(self, patches: dict[str, TensorFile], label: str) -> ModelGraph:
        """Replace tensors, named as in the base checkpoint."""
        unknown = next((name for name in patches if name not in self.base.tensors), None)
        if unknown is not None:
            raise ModelError(f"{unknown!r} cannot be patched: the base checkpoint has no tensor of that name")
        return self.model_copy(update={"patches": {**self.patches, **patches}, "label": label})

    def stored_tensor(self, name: str) -> StoredTensor:
        """Where the current value of a base tensor lies."""
        patch = self.patches.get(name)
        return self.base.tensors[name] if patch is None else read_header(patch.path)[name]

    def layer_tensors(self, layer: int) -> dict[str, StoredTensor]:
        """Tensors of one base layer, by their name in the base checkpoint."""
        return {name: self.stored_tensor(name) for name in self.base.names_by_layer.get(layer, ())}

    def layer_elements(self) -> dict[int, int]:
        """Parameters of each kept layer, by base layer."""
        return {layer: sum(tensor.elements for tensor in self.layer_tensors(layer).values()) for layer in self.layers}

    def map_sizes(self) -> tuple[int, int]:
        """Most inputs that a matrix of a kept layer has, and the hidden size: what most of them start from or end at."""
        shapes = self._matrix_shapes()
        dimensions = Counter(size for shape in shapes for size in shape)
        width = dimensions.most_common(1)[0][0] if dimensions else 0
        return max((inputs for _, inputs in shapes), default=width), width

    def attention_inputs(self) -> int:
        """Inputs of the matrix that attention ends with, as far as shapes say: the fewest of one that gives the hidden size."""
        _, width = self.map_sizes()
        return min((inputs for outputs, inputs in self._matrix_shapes() if outputs == width), default=width)

    def _matrix_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each matrix of a kept layer, as stored."""
        tensors = [tensor for layer in self.layers for tensor in self.layer_tensors(layer).values()]
        return [tensor.shape for tensor in tensors if len(tensor.shape) == 2]

    def other_tensors(self) -> dict[str, StoredTensor]:
        """Embeddings, final norm, head: all that belongs to no layer."""
        return {name: self.stored_tensor(name) for name in self.base.names_by_layer.get(None, ())}

    def export_names(self) -> dict[str, str]:
        """Map the name of each tensor in the base to its name after export, where kept layers are renumbered from 0."""
        prefix = self.base.layer_prefix
        number = {layer: position for position, layer in enumerate(self.layers)}
        names = {}
        for name in self.base.tensors:
            layer = layer_of(name, prefix)
            if layer is None:
                names[name] = name
            elif layer in number:
                names[name] = f"{prefix}.{number[layer]}.{name[len(f'{prefix}.{layer}.') :]}"
        return names

    def export_tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of this model under the name it has on disk after export."""
        return {new: self.stored_tensor(name) for name, new in self.export_names().items()}

    def count_parameters(self) -> int:
        """Elements of all tensors on disk; tied weights are stored, and counted, once."""
        return sum(tensor.elements for tensor in self.export_tensors().values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors after export."""
        return sum(tensor.size_as(self.dtype) for tensor in self.export_tensors().values())


def open_model(source: ModelSource, digest_of: Callable[[Path], str] = sha256_of) -> ModelGraph:
    """The whole model that a recipe starts from, downloaded if it must be. Tensors stay on disk until they are used.

    `digest_of` gives the SHA-256 of a file. Raises `ModelError` where there is no such model, or it is none that can be pruned.
    """
    graph = open_folder(source.fetch_folder(), source.name, source.dtype, digest_of)
    return graph.model_copy(update={"base": graph.base.model_copy(update={"from_hub": source.id is not None})})


def open_folder(
    folder: Path, name: str | None = None, dtype: str | None = None, digest_of: Callable[[Path], str] = sha256_of
) -> ModelGraph:
    """A checkpoint folder as a graph that keeps every layer."""
    config = load_config(folder)
    layers = count_layers(config)
    if layers is None:
        raise ModelError(f"{str(folder / 'config.json')!r} does not say how many layers the model has")
    base = BaseCheckpoint(folder=folder.resolve(), name=name or str(folder), sha256="", layers=layers)
    check_folder(base.folder)
    check_sizes(config, {name: tensor.shape for name, tensor in base.tensors.items()}, folder)
    _ = base.layer_prefix
    files = [base.folder / "config.json", *base.companion_files(), *{tensor.file for tensor in base.tensors.values()}]
    content = sha256_of_value({file.relative_to(base.folder).as_posix(): digest_of(file) for file in sorted(files)})
    base = base.model_copy(update={"sha256": content})
    return ModelGraph(base=base, layers=tuple(range(layers)), dtype=dtype)
