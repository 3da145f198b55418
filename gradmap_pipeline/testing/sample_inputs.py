"""Small inputs for any stage, made from the built-in model by the stages that are installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import Artifact
from ..checkpoint.graph import ModelGraph, open_model
from ..checkpoint.source import ModelSource
from ..errors import OptionError, PluginError
from ..export.exports import Export, TransformersFolder
from ..recipe.validation import Invalid, validate
from ..stages.exporting import FolderExport
from ..stages.layer_scores import LayerScores
from . import run_stage

if TYPE_CHECKING:
    from ..recipe.catalog import Catalog
    from ..stages.stage import Stage

_REMOVED = (4, 8)
"""Layers of the built-in model that are left out for stages that work on what pruning leaves."""
_LENGTHS: dict[str, Any] = {"samples": 8, "sequence_length": 64}
_OPTIONS: dict[str, dict[str, Any]] = {
    "calibrate": {"dataset": {"builtin": "calibration"}, **_LENGTHS},
    "evaluate": {"dataset": {"builtin": "heldout"}, **_LENGTHS},
    "distill": {"dataset": {"builtin": "calibration"}, "samples": 16, "sequence_length": 64, "steps": 10},
    "refit_layers": {"steps": 10},
}
_FIRST = ("calibrate", "evaluate", "last_layers_score")
"""Stages that make an input, before others that could."""


def make_stage(cls: type[Stage], folder: Path, options: dict[str, Any]) -> Stage:
    """A stage with these options, and for those that it needs and the caller did not give, small values where they are known.

    Raises `OptionError` with what is wrong or missing.
    """
    known = _OPTIONS.get(cls.name, {})
    if issubclass(cls, FolderExport):
        known = {**known, "to": str(folder / "out")}
    try:
        return validate(cls, {**known, **options})
    except Invalid as invalid:
        place, said = invalid.complaints[0]
        named = ".".join(map(str, place))
        raise OptionError(
            named, f"stage {cls.name!r}: option {named!r}: {said}; options are given as --set {cls.name}.OPTION=VALUE"
        ) from None


def make_inputs(cls: type[Stage], catalog: Catalog, folder: Path) -> dict[str, Any]:
    """Inputs for a stage, optional ones included where some stage makes them.

    Layers are missing from the model unless the stage ranks layers, or takes a ranking. Raises `PluginError` where no installed
    stage makes a required input.
    """
    types = [*cls.output_fields().values(), *(one for accepted, _ in cls.input_fields().values() for one in accepted)]
    model = open_model(ModelSource.model_validate({"builtin": "docs-llama"}))
    if not any(issubclass(one, LayerScores) for one in types):
        model = model.without_layers(_REMOVED)
    return _Maker(catalog, folder, model).make_inputs(cls)


class _Maker:
    def __init__(self, catalog: Catalog, folder: Path, model: ModelGraph) -> None:
        self.catalog = catalog
        self.folder = folder
        self.model = model
        self.made: dict[str, Any] = {}
        """Outputs by stage; None while one is being made."""

    def make_inputs(self, cls: type[Stage]) -> dict[str, Any]:
        inputs = {}
        for name, (accepted, is_required) in cls.input_fields().items():
            value = self._make(name, accepted)
            if value is not None:
                inputs[name] = value
            elif is_required:
                wanted = " or ".join(one.__name__ for one in accepted)
                raise PluginError(
                    f"stage {cls.name!r} takes {name!r} ({wanted}), which no installed stage makes from the built-in model "
                    "without options; call gradmap_pipeline.testing.check_stage with one in a test"
                )
        return inputs

    def _make(self, name: str, accepted: tuple[type[Artifact], ...]) -> Artifact | None:
        if issubclass(ModelGraph, accepted):
            return self.model
        if any(issubclass(one, Export) for one in accepted):
            return self._export(accepted)
        makers = sorted(self.catalog.producers(name, accepted), key=lambda one: (one not in _FIRST, one))
        for maker in makers:
            outputs = self._run(maker, {})
            if outputs is not None:
                return getattr(outputs, name)  # type: ignore[no-any-return]
        return None

    def _export(self, accepted: tuple[type[Artifact], ...]) -> Artifact | None:
        form = "safetensors" if issubclass(TransformersFolder, accepted) else "onnx"
        exported = getattr(self._run("export", {"format": form}), "exported", None)
        return exported if isinstance(exported, accepted) else None

    def _run(self, name: str, options: dict[str, Any]) -> Any:
        """Outputs of an installed stage; None where it cannot be run so."""
        if name not in self.catalog.stages:
            return None
        key = f"{name} {options}"
        if key not in self.made:
            self.made[key] = None
            cls, place = self.catalog.stages[name], self.folder / f"made-{len(self.made)}"
            try:
                self.made[key] = run_stage(make_stage(cls, place, options), place / "work", **self.make_inputs(cls))
            except (OptionError, PluginError):
                return None
        return self.made[key]
