"""What a plugin author writes: a Stage, which is one operation on a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict

from ..artifacts import Artifact
from ..checkpoint.model import ExportableModel, Model
from ..context import Context
from ..errors import PluginError
from ..machine.environment import Environment

if TYPE_CHECKING:
    from ..cost.estimate import Estimate
    from ..cost.model_costs import ModelCosts
    from .forecasts import Forecasts, Outlook
    from .structure_probe import StructureProbe


class Stage(BaseModel):
    """One operation on a model. Fields are the options a recipe may set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """How recipes refer to this stage: `verb_noun`."""
    Inputs: ClassVar[type[BaseModel]]
    Outputs: ClassVar[type[BaseModel]]
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """Distributions whose version changes the result; part of the key under which results are kept."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Modules besides the package's own dependencies, without which the stage cannot work; `gradmap check` looks for them."""
    extra: ClassVar[str] = ""
    """The extra that installs them, of the distribution that installs the stage; of this package for a stage in a single file."""

    environment: ClassVar[Environment | None] = None
    """What the stage needs of a Python of its own, where its libraries exclude those of the others. Its options, `forecast` and
    `inspect` are asked here; `run` is called there. None: it runs in the Python that is running."""

    aliases: ClassVar[tuple[str, ...]] = ()
    """Names that the stage had before. Recipes that use them work, and are told the present one."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Old names of options, each with the present one. Recipes that use them work, and are told the present one."""
    deprecated: ClassVar[str] = ""
    """What to use instead, where the stage is going to be removed."""
    requires_api: ClassVar[str] = ""
    """Versions of the plugin API that the stage works with: `>=1`. A plugin's module may have one for all its stages."""

    metric_names: ClassVar[tuple[str, ...] | None] = None
    """Names of the metrics that its outputs carry: `gradmap check` refuses limits on others. None: known when it has run."""
    reads_metrics: ClassVar[bool] = False
    """Whether it uses `context.metrics`: what earlier steps have measured of the models that it takes, and of the unpruned
    one. They count as an input."""

    machine_bound: ClassVar[bool] = False
    """Whether what it gives holds for one machine alone, as times do: device, processor, threads and system are part of the key
    under which results are kept, and running it again may give something else."""

    abstract: ClassVar[bool]
    """True on a class that is not a stage but what several stages have in common. Classes derived from it are stages again."""

    parallel: ClassVar[bool] = False
    """Whether all processes of a run do this step together, each on its share of the samples, with `context.group` to sum
    what they find. Otherwise one process does it."""

    def run(self, inputs: Any, context: Context) -> BaseModel:
        """Do the work and return `Outputs`."""
        raise NotImplementedError

    def forecast(self, inputs: Forecasts) -> Outlook:
        """Say what the plan can know of the outputs; raise `OptionError` when the options cannot work.

        `inputs.of(ModelGraph)` is the forecast of the input of that class; its fields are None where they are not known. Each
        value returned is of the `Forecast` class of its output. Reads no weights, imports nothing heavy.
        """
        return {}

    def request(self, inputs: Forecasts) -> Mapping[str, Mapping[str, Any]]:
        """By input, options that the step which makes it should have where the recipe leaves them open.

        So a recipe says once what two steps must agree on. `inputs` has forecasts, as for `forecast`. Raise `OptionError` as there.
        """
        return {}

    def take_requests(self, requests: Sequence[Mapping[str, Any]], inputs: Forecasts) -> Stage:
        """This stage with what later steps request of it, where the recipe leaves that open. Here nothing is taken.

        `inputs`: forecasts of this stage's own inputs.
        """
        return self

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        """Raise `OptionError` or `ModelError` where this stage cannot work on a model of this structure.

        It is called before a run starts, so that nobody waits for hours to learn it. `inputs` has forecasts, as for `forecast`;
        `probe` answers for the recipe's model. Reads no weights.
        """

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        """Say what the user should know before a run, though nothing refuses it: one fact a line.

        `inputs` has forecasts, as for `forecast`. `gradmap check` and `gradmap plan` print the lines. Reads no weights.
        """
        return ()

    def estimate(self, inputs: Forecasts, costs: ModelCosts) -> Estimate | None:
        """Say what a run would take; None where that is not known. Raise `CapacityError` when it cannot fit.

        `inputs` has forecasts, as for `forecast`; `costs` answers for sweeps over the model and for this machine.
        `known(inputs.of(ModelGraph).layers)` is the number of layers, and ends the method where the plan does not know it: the
        estimate is then not known either.
        """
        return None

    def writes(self) -> tuple[Path, ...]:
        """Files and folders outside the store that a run of this step makes."""
        return ()

    @classmethod
    def input_fields(cls) -> dict[str, tuple[tuple[type[Artifact], ...], bool]]:
        """Input name to (artifact types that it takes, required)."""
        return {name: (_artifact_types(info.annotation), info.is_required()) for name, info in cls.Inputs.model_fields.items()}

    @classmethod
    def output_fields(cls) -> dict[str, type[Artifact]]:
        """Output name to artifact type."""
        return {name: _artifact_type(info.annotation) for name, info in cls.Outputs.model_fields.items()}

    def output_types(self) -> dict[str, type[Artifact]]:
        """Outputs of this step, as `output_fields`: where options decide what an output is, the class they lead to."""
        return self.output_fields()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if is_abstract(cls):
            return
        for required, expected in (("name", str), ("Inputs", type), ("Outputs", type)):
            if not hasattr(cls, required):
                raise PluginError(f"stage {cls.__name__} in {cls.__module__} must define {required!r}")
            if not isinstance(getattr(cls, required), expected) or (
                expected is type and not issubclass(getattr(cls, required), BaseModel)
            ):
                wanted = "text" if expected is str else "a class derived from pydantic's BaseModel"
                raise PluginError(f"stage {cls.__name__} in {cls.__module__}: {required!r} must be {wanted}")
        if cls.parallel and cls.environment is not None:
            raise PluginError(
                f"stage {cls.name!r} is parallel and has an environment; one process runs there, so it can be only one"
            )
        if not cls.__doc__:
            raise PluginError(f"stage {cls.name!r} needs a docstring: its first line is shown by `gradmap stages`")
        if "limits" in cls.model_fields:
            raise PluginError(f"stage {cls.name!r}: option 'limits' has the name of a key of steps; give it another name")
        for option, info in cls.model_fields.items():
            if not info.description:
                raise PluginError(f"stage {cls.name!r}: option {option!r} needs a Field(description=...)")
        _check_ports(cls)


def is_abstract(stage: type[Stage]) -> bool:
    """Whether a class is the base of stages, and no stage itself."""
    return stage is Stage or stage.__dict__.get("abstract") is True


def _check_ports(stage: type[Stage]) -> None:
    """Raise `PluginError` unless all that a stage takes and gives are artifacts."""
    for port in ("Inputs", "Outputs"):
        for name, info in getattr(stage, port).model_fields.items():
            if port == "Outputs" and info.annotation in (Model, ExportableModel):
                wide = info.annotation.__name__
                raise PluginError(f"stage {stage.name!r}: Outputs.{name} must be one class of models; {wide} is for inputs")
            try:
                _artifact_type(info.annotation)
            except TypeError:
                raise PluginError(
                    f"stage {stage.name!r}: {port}.{name} must be an Artifact subclass, got {info.annotation!r}"
                ) from None


def _artifact_types(annotation: Any) -> tuple[type[Artifact], ...]:
    """The artifact classes in `X`, `X | None` or `X | Y`."""
    types = [part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and issubclass(part, Artifact)]
    if not types:
        raise TypeError(annotation)
    return tuple(types)


def _artifact_type(annotation: Any) -> type[Artifact]:
    """The nearest class that several artifact classes all derive from."""
    types = _artifact_types(annotation)
    return next(base for base in types[0].__mro__ if all(issubclass(other, base) for other in types))


def name_types(types: Sequence[type[Artifact]]) -> str:
    """`ModelGraph or OnnxFolder`, for messages."""
    return " or ".join(cls.__name__ for cls in types)
