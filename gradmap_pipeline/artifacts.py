"""Typed values that travel between stages: small data inline, tensors in safetensors files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainSerializer,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from .errors import PluginError, describe_value
from .machine.digests import sha256_of, sha256_of_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from typing_extensions import Self

    from .metrics import Metric


def _relative_to_store(path: Path, info: SerializationInfo) -> str:
    root = (info.context or {}).get("store")
    return str(path.relative_to(root) if root and path.is_relative_to(root) else path)


def _resolved_in_store(value: object, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Path:
    path: Path = validate(value)
    root = (info.context or {}).get("store")
    return root / path if root and not path.is_absolute() else path


StoredPath = Annotated[Path, PlainSerializer(_relative_to_store), WrapValidator(_resolved_in_store)]
"""A path saved relative to the store, so that a store can be moved."""


@dataclass(frozen=True)
class NameOf:
    """Marks a text of an artifact, in `Annotated`, as the name of what an option of its stage gives.

    Options count by content, so a result from the store may be of a file that the recipe now calls by another name. It gets
    that name.
    """

    option: str


def name_in(options: BaseModel, option: str) -> str | None:
    """The name of what an option gives, such as a data set; None where it has none."""
    name = getattr(getattr(options, option, None), "name", None)
    return name if isinstance(name, str) else None


def only_for_people(text: str, info: SerializationInfo) -> str:
    return "" if (info.context or {}).get("content_only") else text


LINEAGE = "gradmap.json"
"""In every export: how it came to be, with the digests of the other files."""

PAGE = "report.html"
"""In every export: the same for people, as a page that a browser shows."""


_MOVED = {"count_bytes": "size_bytes", "kind": "format_name"}
"""Earlier names of artifacts' members, and the properties that they are now."""


class NoForecast(BaseModel):
    """The forecast of an artifact of which a plan knows nothing before the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Artifact(BaseModel):
    """Base of everything a stage takes or returns. Numbers that are not finite are refused, at any depth."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    Forecast: ClassVar[Callable[..., BaseModel]] = NoForecast
    """The class of what a plan knows of such an artifact before the run: a pydantic model whose fields all have a default."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        here = f"class {cls.__name__} in {cls.__module__}"
        for before, now in _MOVED.items():
            if before in vars(cls) and now not in vars(cls) and hasattr(cls, now):
                raise PluginError(f"{here}: {before!r} is the property {now!r} now")
        forecast: Any = cls.Forecast
        if not isinstance(forecast, type) or not issubclass(forecast, BaseModel):
            raise PluginError(
                f"{here}: 'Forecast' must be a class derived from pydantic's BaseModel, got {describe_value(forecast)}"
            )
        required = next((name for name, info in forecast.model_fields.items() if info.is_required()), None)
        if required is not None:
            raise PluginError(f"{here}: field {required!r} of its 'Forecast' needs a default: the value where nothing is known")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _MOVED and hasattr(type(self), _MOVED[name]):
                raise AttributeError(f"{name!r} of {type(self).__name__} is the property {_MOVED[name]!r} now")
            return super().__getattr__(name)

    @model_validator(mode="after")
    def _check_finite(self) -> Artifact:
        place = find_not_finite(self)
        if place is not None:
            raise ValueError(f"{place} of {type(self).__name__} is not a finite number; an artifact holds finite numbers")
        return self

    def content(self) -> Any:
        """JSON of what this artifact holds, without the places where it lies: equal content, equal value."""
        return self.model_dump(mode="json", context={"content_only": True})

    @property
    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return sha256_of_value(self.content())

    def with_names_of(self, options: BaseModel) -> Self:
        """Return this artifact with the names that the options of its stage have now."""
        names = {}
        for field, info in type(self).model_fields.items():
            for mark in info.metadata:
                name = name_in(options, mark.option) if isinstance(mark, NameOf) else None
                if name is not None:
                    names[field] = name
        return self.model_copy(update=names)

    def list_metrics(self) -> Sequence[Metric]:
        """What it says of how good models are: tables, limits, comparisons, model cards and JSON show it.

        A metric that names no model is of the one whose digest is in the field `model` of this artifact.
        """
        return ()

    def files_by_path(self) -> dict[Path, str]:
        """SHA-256 of every file that belongs to it."""
        return {file.path: file.sha256 for file in find_tensor_files(self)}


class TensorFile(BaseModel):
    """A safetensors file and the digest of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: StoredPath
    sha256: str

    @model_serializer(mode="wrap")
    def _leave_out_path(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        return {"sha256": self.sha256} if (info.context or {}).get("content_only") else serialize(self)

    @classmethod
    def save(cls, tensors: dict[str, torch.Tensor], path: Path) -> TensorFile:
        """Write tensors and remember the digest of the file."""
        from safetensors.torch import save_file

        save_file(tensors, path)
        return cls(path=path, sha256=sha256_of(path))

    def load(self) -> dict[str, torch.Tensor]:
        """Read all tensors, memory-mapped."""
        from safetensors.torch import load_file

        return load_file(self.path)


def find_tensor_files(value: Any) -> list[TensorFile]:
    """All tensor files inside a value."""
    if isinstance(value, TensorFile):
        return [value]
    if isinstance(value, BaseModel):
        value = [getattr(value, name) for name in type(value).model_fields]
    elif isinstance(value, dict):
        value = list(value.values())
    return [file for item in value for file in find_tensor_files(item)] if isinstance(value, list | tuple) else []


def find_not_finite(value: Any, place: str = "") -> str | None:
    """Where in a value, its models, mappings and lists, the first number is that is not finite; None where there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    if isinstance(value, BaseModel):
        inside = [(f"{place}.{name}" if place else name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        inside = [(f"{place}.{key}", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        inside = [(f"{place}.{number}", part) for number, part in enumerate(value)]
    else:
        return None
    return next((deeper for where, part in inside if (deeper := find_not_finite(part, where)) is not None), None)


class ExportedFile(BaseModel):
    """One file of an export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes."""
    sha256: str
