"""Everything a plugin author needs. Names are imported when first used, so that the command line starts at once."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .artifacts import (
        Artifact,
        CalibrationForecast,
        CalibrationSet,
        Decision,
        ExportedFile,
        LayerScores,
        ModelForecast,
        NameOf,
        Round,
        ScoresForecast,
        TensorFile,
        Work,
    )
    from .checkpoint.graph import ModelGraph
    from .checkpoint.model import Model
    from .context import Context
    from .correction.correction import Compensation, CorrectedSite
    from .cost.estimate import Estimate
    from .cost.model_costs import ModelCosts
    from .data import DatasetSource
    from .errors import CapacityError, ModelError, OptionError, QualityError, StageError
    from .export.exports import Export, OnnxFolder, TransformersFolder
    from .machine.environment import Environment
    from .measurements import Evaluation, Measurement
    from .metrics import Metric
    from .stages.compensating import LayerCompensation
    from .stages.exporting import FolderExport
    from .stages.forecasts import Forecasts, Outlook, known
    from .stages.hookspecs import hookimpl
    from .stages.ranking import Measure
    from .stages.scoring import LayerScoring, take_lowest
    from .stages.stage import Stage
    from .stages.structure_probe import StructureProbe

__version__ = "0.1.0"

API_VERSION = 1
"""Version of what plugins may use; docs/write-a-plugin.md says what stays as it is within one."""

_HOME = {
    "artifacts": (
        "Artifact",
        "CalibrationForecast",
        "CalibrationSet",
        "Decision",
        "ExportedFile",
        "LayerScores",
        "ModelForecast",
        "NameOf",
        "Round",
        "ScoresForecast",
        "TensorFile",
        "Work",
    ),
    "stages.compensating": ("LayerCompensation",),
    "data": ("DatasetSource",),
    "machine.environment": ("Environment",),
    "measurements": ("Evaluation", "Measurement"),
    "metrics": ("Metric",),
    "errors": ("CapacityError", "ModelError", "OptionError", "QualityError", "StageError"),
    "cost.estimate": ("Estimate",),
    "stages.exporting": ("FolderExport",),
    "export.exports": ("Export", "GgufFolder", "OnnxFolder", "TransformersFolder"),
    "stages.hookspecs": ("hookimpl",),
    "correction.correction": ("Compensation", "CorrectedSite"),
    "checkpoint.graph": ("ModelGraph",),
    "checkpoint.model": ("Model",),
    "stages.forecasts": ("Forecasts", "Outlook", "known"),
    "stages.structure_probe": ("StructureProbe",),
    "cost.model_costs": ("ModelCosts",),
    "stages.ranking": ("Measure",),
    "stages.scoring": ("LayerScoring", "take_lowest"),
    "context": ("Context",),
    "stages.stage": ("Stage",),
}

__all__ = [
    "Artifact",
    "CalibrationForecast",
    "CalibrationSet",
    "CapacityError",
    "Compensation",
    "Context",
    "CorrectedSite",
    "DatasetSource",
    "Decision",
    "Environment",
    "Estimate",
    "Evaluation",
    "Export",
    "ExportedFile",
    "FolderExport",
    "Forecasts",
    "GgufFolder",
    "LayerCompensation",
    "LayerScores",
    "LayerScoring",
    "Measure",
    "Measurement",
    "Metric",
    "Model",
    "ModelCosts",
    "ModelError",
    "ModelForecast",
    "ModelGraph",
    "NameOf",
    "OnnxFolder",
    "OptionError",
    "Outlook",
    "QualityError",
    "Round",
    "ScoresForecast",
    "Stage",
    "StageError",
    "StructureProbe",
    "TensorFile",
    "TransformersFolder",
    "Work",
    "hookimpl",
    "known",
    "take_lowest",
]


_RENAMED = {"Rehearsal": "ModelCosts", "Survey": "StructureProbe"}
"""Public names of before, and what they are called now."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        raise ImportError(f"{name!r} is called {_RENAMED[name]!r} now", name=name)
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
