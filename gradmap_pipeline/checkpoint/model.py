"""Model: what an artifact must have so that it can be evaluated, whoever wrote its class."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from ..artifacts import Artifact
from ..errors import PluginError
from .forecast import ModelForecast

if TYPE_CHECKING:
    import torch

    from ..batches import Batch
    from .graph import ModelGraph

_VALUES = ("label", "size_bytes", "graph")
"""Fields or properties of every model, besides its method `open`."""


def is_abstract(cls: type) -> bool:
    """Whether a class of models is met by members, and no artifact is of this class itself."""
    return vars(cls).get("abstract") is True


def find_lacking(cls: type) -> str | None:
    """What a class of artifacts lacks to be a model; None where it is one."""
    if not issubclass(cls, Artifact):
        return "a base class Artifact"
    for name in _VALUES:
        if isfunction(getattr(cls, name, None)):
            return f"{name!r} as a property or field; it is a method"
        if name not in cls.model_fields and not hasattr(cls, name):
            return f"a property or field {name!r}"
    is_own = isfunction(getattr(cls, "open", None)) and cls.open is not Model.open  # type: ignore[attr-defined]
    return None if is_own else "a method 'open'"


def _meets(cls: type, other: type) -> bool:
    """Whether a class has what the abstract class `cls` requires."""
    is_exportable = getattr(other, "computes_graph", False) is True
    return find_lacking(other) is None and (is_exportable or not getattr(cls, "computes_graph", False))


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as _ByMembers
else:

    class _ByMembers(type(Artifact)):
        """Makes a class that has the members of a model a model; pydantic leaves out what `abc` has for that."""

        def __subclasscheck__(cls, other: type) -> bool:
            return super().__subclasscheck__(other) or (is_abstract(cls) and _meets(cls, other))

        def __instancecheck__(cls, instance: object) -> bool:
            return issubclass(type(instance), cls)


class Model(Artifact, metaclass=_ByMembers):
    """A language model in a form that can be evaluated.

    Every class derived from `Artifact` that has `open`, `label`, `size_bytes` and `graph` is a model, whether it derives from this
    class or not. `ModelGraph`, `TransformersFolder`, `OnnxFolder` and `GgufFolder` are models.
    """

    Forecast = ModelForecast

    abstract: ClassVar[bool] = True
    computes_graph: ClassVar[bool] = False
    """Whether the logits of every such model are those of its `graph`, so that an exporter may write the graph."""

    if TYPE_CHECKING:  # at run time a derived class may have fields of these names

        @property
        def label(self) -> str:
            """What was done to the model, for tables."""

        @property
        def size_bytes(self) -> int:
            """Bytes of its weights on disk, or after export."""

        @property
        def graph(self) -> ModelGraph:
            """The layers and tensors that it was made from."""

    def open(self, device: str) -> Callable[[Batch], torch.Tensor]:
        """Read it into memory; the function returned gives logits (B, T, V) of a batch of token ids (B, T)."""
        raise NotImplementedError

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if is_abstract(cls):
            return
        lacking = find_lacking(cls)
        if lacking is not None:
            raise PluginError(f"{cls.__name__} in {cls.__module__} derives from Model, and must define {lacking}")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """An input declared as `Model` takes a model of any class, as it is."""
        return core_schema.is_instance_schema(cls, cls_repr="Model") if is_abstract(cls) else handler(source)


class ExportableModel(Model):
    """A model whose logits are those of its `graph`, in float32: an exporter writes the graph.

    Every class of models that says `computes_graph: ClassVar[bool] = True` is one, whether it derives from this class or not.
    """

    abstract: ClassVar[bool] = True
    computes_graph: ClassVar[bool] = True
