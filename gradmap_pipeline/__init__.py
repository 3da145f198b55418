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
        Evaluation,
        ExportedFile,
        LayerScores,
        Model,
        ModelForecast,
        Round,
        ScoresForecast,
        TensorFile,
        Work,
    )
    from .compensating import LayerCompensation
    from .data import DatasetSource
    from .environment import Environment
    from .errors import CapacityError, ModelError, OptionError, QualityError, StageError
    from .estimate import Estimate
    from .exporting import FolderExport
    from .exports import Export, OnnxFolder, TransformersFolder
    from .hookspecs import hookimpl
    from .model.correction import Compensation, CorrectedSite
    from .model.graph import ModelGraph
    from .model.survey import Survey
    from .ranking import Measure
    from .rehearsal import Rehearsal
    from .scoring import LayerScoring, take_lowest
    from .stage import Context, Stage

__version__ = "0.1.0"

API_VERSION = 1
"""Version of what plugins may use; docs/write-a-plugin.md says what stays as it is within one."""

_HOME = {
    "artifacts": (
        "Artifact",
        "CalibrationForecast",
        "CalibrationSet",
        "Decision",
        "Evaluation",
        "ExportedFile",
        "LayerScores",
        "Model",
        "ModelForecast",
        "Round",
        "ScoresForecast",
        "TensorFile",
        "Work",
    ),
    "compensating": ("LayerCompensation",),
    "data": ("DatasetSource",),
    "environment": ("Environment",),
    "errors": ("CapacityError", "ModelError", "OptionError", "QualityError", "StageError"),
    "estimate": ("Estimate",),
    "exporting": ("FolderExport",),
    "exports": ("Export", "GgufFolder", "OnnxFolder", "TransformersFolder"),
    "hookspecs": ("hookimpl",),
    "model.correction": ("Compensation", "CorrectedSite"),
    "model.graph": ("ModelGraph",),
    "model.survey": ("Survey",),
    "rehearsal": ("Rehearsal",),
    "ranking": ("Measure",),
    "scoring": ("LayerScoring", "take_lowest"),
    "stage": ("Context", "Stage"),
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
    "GgufFolder",
    "LayerCompensation",
    "LayerScores",
    "LayerScoring",
    "Measure",
    "Model",
    "ModelError",
    "ModelForecast",
    "ModelGraph",
    "OnnxFolder",
    "OptionError",
    "QualityError",
    "Rehearsal",
    "Round",
    "ScoresForecast",
    "Stage",
    "StageError",
    "Survey",
    "TensorFile",
    "TransformersFolder",
    "Work",
    "hookimpl",
    "take_lowest",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
