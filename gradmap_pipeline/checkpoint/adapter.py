"""All that this package takes from transformers by convention or by private names, in one place.

`tests/test_transformers_contract.py` holds each fact that is relied on here, and says what breaks without it.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_SYNCHRONOUS = "HF_DEACTIVATE_ASYNC_LOAD"
"""With it transformers reads a tensor when a parameter takes it, and not all tensors ahead in threads."""


@dataclass(frozen=True)
class Loading:
    """What transformers says of tensors that it brought in."""

    report: Any

    @property
    def missing(self) -> set[str]:
        """Names of parameters that got no value."""
        return set(self.report.missing_keys)

    def find_left_over(self, module: PreTrainedModel) -> set[str]:
        """Names on disk that the model has no place for, without those that its class ignores."""
        report = copy.copy(self.report)
        module._adjust_missing_and_unexpected_keys(report)
        names: set[str] = report.unexpected_keys
        return names


class LateTensor:
    """A tensor that is read when transformers takes it, so that no two are in memory at once."""

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, _: object) -> torch.Tensor:
        return self._read()


def load_tensors(module: PreTrainedModel, tensors: Mapping[str, LateTensor], dtype: torch.dtype, device: str) -> Loading:
    """Bring tensors in under their names on disk, through the conversions that transformers has for the architecture.

    Experts that are stored one by one go into their place one by one. Raises `ModelError` where a tensor has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    options = LoadStateDictConfig(
        dtype=dtype,
        device_map={"": device},
        dtype_plan=module._get_dtype_plan(dtype),
        weight_mapping=[_fill_in_place(step) for step in get_model_conversion_mapping(module)],
    )
    with _reading_late():
        report, _ = convert_and_load_state_dict_in_model(module, dict(tensors), options)
    if report.mismatched_keys:
        name, stored, wanted = next(iter(report.mismatched_keys))
        raise ModelError(f"{name!r} has shape {tuple(stored)} in the checkpoint, but its config requires {tuple(wanted)}")
    if report.conversion_errors:
        name, error = next(iter(report.conversion_errors.items()))
        raise ModelError(f"the tensors that make {name!r} do not fit together: {_reason_of(str(error))}")
    return Loading(report)


def _reason_of(error: str) -> str:
    """What went wrong, out of a text of a traceback, the error's own words, and a line that says where."""
    lines = error.strip().splitlines()
    if len(lines) > 1 and lines[-1].startswith("Error"):
        del lines[-1]
    return lines[-1][:200]


@contextmanager
def _reading_late() -> Iterator[None]:
    before = os.environ.get(_SYNCHRONOUS)
    os.environ[_SYNCHRONOUS] = "1"
    try:
        yield
    finally:
        del os.environ[_SYNCHRONOUS]
        if before is not None:
            os.environ[_SYNCHRONOUS] = before


def _fill_in_place(step: Any) -> Any:
    """A conversion of transformers; one that stacks experts, and joins the stacks, fills its result tensor by tensor instead."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    if type(step) is not WeightConverter or step.force_cpu:
        return step
    kinds = [type(operation) for operation in step.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        return step
    stacked, *joined = (operation.dim for operation in step.operations)  # type: ignore[attr-defined]
    if stacked != 0 or joined not in ([], [1]):
        return step
    return _make_filling(step)


def _make_filling(step: Any) -> Any:
    import torch
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Fill(ConversionOps):
        """Experts' matrices (m, n), of one source or more, into one tensor (experts, sum of m, n)."""

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, list[Any]], source_patterns: list[str], target_patterns: list[str], **_: Any
        ) -> dict[str, torch.Tensor]:
            waiting = [input_dict[pattern] for pattern in source_patterns if pattern in input_dict]
            experts = len(waiting[0])
            if any(len(source) != experts for source in waiting):
                raise ValueError(f"there are {' and '.join(str(len(source)) for source in waiting)} of them")
            made: torch.Tensor | None = None
            starts: list[int] = []
            for expert in range(experts):
                matrices = [_take(source, expert) for source in waiting] if made is None else None
                if matrices is not None:
                    rows = [matrix.shape[0] for matrix in matrices]
                    starts = [sum(rows[:number]) for number in range(len(rows) + 1)]
                    first = matrices[0]
                    made = torch.empty((experts, starts[-1], *first.shape[1:]), dtype=first.dtype, device=first.device)
                assert made is not None
                for number, source in enumerate(waiting):
                    matrix = _take(source, expert) if matrices is None else matrices[number]
                    place = made[expert, starts[number] : starts[number + 1]]
                    if place.shape != matrix.shape:
                        raise ValueError(f"expert {expert} has shape {tuple(matrix.shape)}, expert 0 {tuple(place.shape)}")
                    place.copy_(matrix)
            assert made is not None
            return {target_patterns[0]: made}

    class FillingConverter(WeightConverter):
        """Hands its tensors to its operation as they are read."""

        def materialize_tensors(self) -> dict[str, list[Any]]:
            waiting = dict(self.collected_tensors)
            self.collected_tensors.clear()
            return waiting

    return FillingConverter(step.source_patterns, step.target_patterns, operations=[Fill()])


def _take(source: list[Any], number: int) -> torch.Tensor:
    """Read one tensor, and forget where it came from."""
    job, source[number] = source[number], None
    tensor: torch.Tensor = job.result() if isinstance(job, Future) else job() if callable(job) else job
    return tensor


def count_conversion_copies(module: PreTrainedModel) -> int:
    """Copies of a layer's tensors that loading holds at a time, besides the layer: of conversions that do not go one by one."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return 2 * any(type(_fill_in_place(step)) is WeightConverter for step in get_model_conversion_mapping(module))


def has_types_of_its_own(module: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether the architecture keeps some parameters in another type than the one to compute in."""
    return bool(module._get_dtype_plan(dtype))


def tie_weights(module: PreTrainedModel, missing: set[str]) -> None:
    """Give parameters that are tied to others, and that no tensor brought in, their values."""
    module.tie_weights(missing_keys=missing, recompute_mapping=False)


def is_tied(module: PreTrainedModel, name: str) -> bool:
    """Whether a parameter gets its value from another."""
    return name in module.all_tied_weights_keys


def find_embeddings(module: PreTrainedModel) -> nn.Embedding | None:
    """The embeddings of tokens, where they are one table."""
    from torch import nn

    try:
        embeddings = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # an architecture that has several
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def find_head(module: PreTrainedModel) -> nn.Linear | None:
    """The linear map from the last hidden states to logits, where it is one."""
    from torch import nn

    head = module.get_output_embeddings()
    return head if isinstance(head, nn.Linear) else None


def compute_buffers(module: PreTrainedModel) -> None:
    """Fill the buffers that no checkpoint holds, and leave parameters as they are."""
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module.initialize_weights()


def prefix_on_disk(module: PreTrainedModel) -> str:
    """What the names of a decoder's parameters start with in a checkpoint of a causal LM, where the file leaves it out."""
    return f"{module.base_model_prefix}."


def takes(module: PreTrainedModel, argument: str) -> bool:
    """Whether the model's `forward` has an argument of this name."""
    return argument in inspect.signature(module.forward).parameters


def can_keep_positions(module: PreTrainedModel) -> bool:
    """Whether logits can be computed at some positions alone."""
    return takes(module, "logits_to_keep")


def call_without_cache(
    module: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, kept: torch.Tensor | None = None
) -> Any:
    """The model's output for token ids (B, T) and mask int64 (B, T). `kept`: positions (n,) whose logits alone are computed."""
    return module(input_ids=ids, attention_mask=mask, use_cache=False, **({} if kept is None else {"logits_to_keep": kept}))


def call_with_cache(module: PreTrainedModel, ids: torch.Tensor, cache: Any = None, last: bool = False) -> tuple[torch.Tensor, Any]:
    """Logits (B, T, V) of token ids (B, T) that follow those in the cache, and the cache with these, too.

    `last`: the logits of the last position alone, where the model can. Raises `ModelError` where it keeps no keys and values.
    """
    kept = {"logits_to_keep": 1} if last and can_keep_positions(module) else {}
    output = module(input_ids=ids, past_key_values=cache, use_cache=True, **kept)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(module).__name__} keeps no keys and values, so it cannot generate text one token at a time here")
    return output.logits, cache


def linear_classes() -> tuple[type[nn.Module], ...]:
    """Classes of modules that are one linear map."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return nn.Linear, Conv1D


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear map holds its matrix as (inputs, outputs)."""
    return isinstance(module, linear_classes()[1])


def silence_progress() -> None:
    """No bars of transformers from now on."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def name_cache_layers(config: PretrainedConfig) -> list[str]:
    """Names of the classes that keep keys and values of a layer each, of those that do not keep all tokens' alone."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return [type(layer).__name__ for layer in DynamicCache(config=config).layers if not isinstance(layer, DynamicLayer)]


def refuse_cache(config: PretrainedConfig) -> str | None:
    """Why transformers cannot count the tokens in a cache for a config's layers; None where it can. Raises what else is wrong."""
    from transformers import DynamicCache

    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError as error:
        return str(error)
    return None


def make_cache(pairs: list[tuple[torch.Tensor, torch.Tensor]] | None = None) -> Any:
    """A cache in which every layer keeps all tokens: empty, or with keys and values (B, heads, T, head dimension) by layer."""
    from transformers import DynamicCache

    return DynamicCache() if pairs is None else DynamicCache(pairs)


def read_cache(cache: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer of a cache."""
    return ((layer.keys, layer.values) for layer in cache.layers)
