"""What a plan knows of the inputs of a stage before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import BaseModel

from ..artifacts import Artifact
from ..errors import NotKnownError, PluginError, describe_value

if TYPE_CHECKING:
    from .stage import Stage

T = TypeVar("T")
F_co = TypeVar("F_co", bound=BaseModel, covariant=True)

Outlook = Mapping[str, BaseModel | None]
"""What `forecast` returns: by output, an object of the `Forecast` class of its artifact. None, or no entry: nothing is known."""


class _HasForecast(Protocol[F_co]):
    """A class of artifacts, seen as what names its `Forecast`."""

    def Forecast(self) -> F_co: ...  # noqa: N802 - the name of a class


class Forecasts(Mapping[str, BaseModel | None]):
    """The forecasts of a stage's inputs.

    `inputs.of(ModelGraph)` is the forecast of the input that is a `ModelGraph`, of the type `ModelGraph.Forecast`. By name it is a
    mapping: `"scores" in inputs` says whether an optional input is there; `inputs["scores"]` is None where nothing is known.
    """

    def __init__(
        self, stage: type[Stage], classes: Mapping[str, type[Artifact]] | None = None, /, **known: BaseModel | None
    ) -> None:
        """`stage`: whose inputs these are. `classes`: by input, the class it will be of, where `Inputs` accepts several.

        `known`: by input, its forecast; inputs that are not named are not there.
        """
        self._stage = stage.__name__
        self._types: dict[str, tuple[type[Artifact], ...]] = {name: types for name, (types, _) in stage.input_fields().items()}
        unknown = next((name for name in known if name not in self._types), None)
        if unknown is not None:
            raise PluginError(f"{self._stage} has no input {unknown!r}; inputs are {', '.join(self._types)}")
        self._known = known
        self._classes = classes or {}

    def has(self, artifact: type[Artifact]) -> bool:
        """Whether an input is there that will be of this class; tells which of several classes that `Inputs` accepts it is."""
        classes = ((self._classes[name],) if name in self._classes else self._types[name] for name in self._known)
        return any(all(issubclass(cls, artifact) for cls in each) for each in classes)

    def of(self, artifact: _HasForecast[F_co], name: str | None = None) -> F_co:
        """The forecast of the input that is an `artifact`; empty where nothing is known of it, or no step makes it.

        `name`: of the input, where several are of this class. Raises `PluginError` where no input is, or several are.
        """
        wanted: Any = artifact
        fitting = [each for each, types in self._types.items() if all(issubclass(cls, wanted) for cls in types)]
        if name is None and len(fitting) > 1:
            raise PluginError(
                f"inputs {' and '.join(fitting)} of {self._stage} are of class {wanted.__name__}; "
                f"name one, as in inputs.of({wanted.__name__}, {fitting[0]!r})"
            )
        if not fitting or name not in (None, *fitting):
            asked = f"no input {name!r}" if name is not None else "no input"
            listed = ", ".join(f"{each}: {' or '.join(cls.__name__ for cls in types)}" for each, types in self._types.items())
            raise PluginError(f"{self._stage} has {asked} of class {wanted.__name__}; inputs are {listed}")
        forecast = self._known.get(name or fitting[0])
        return forecast if isinstance(forecast, wanted.Forecast) else artifact.Forecast()

    def __getitem__(self, name: str) -> BaseModel | None:
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


def known(value: T | None) -> T:
    """The value, where it is known. Raises `NotKnownError` where it is None: what the stage is asked is then not known either."""
    if value is None:
        raise NotKnownError("a value that the plan does not know yet is needed")
    return value


def explain_wrong(answer: Mapping[str, Any], types: Mapping[str, type[Artifact]]) -> str | None:
    """What is wrong with the forecasts that a stage returns for its outputs; None where nothing is."""
    for name, forecast in answer.items():
        if name not in types:
            return f"a mapping of its outputs ({', '.join(types)}), got one of {name!r}"
        wanted: Any = types[name].Forecast
        if forecast is not None and not isinstance(forecast, wanted):
            accepted = f"{types[name].__name__}.Forecast ({wanted.__name__}) or None"
            return f"for output {name!r} {accepted}, got {describe_value(forecast)}"
    return None
