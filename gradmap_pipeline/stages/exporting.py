"""What all stages that write a folder for other programs have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from .stage import Stage
from .targets import NewFolder, check_target, new_folder

if TYPE_CHECKING:
    from .forecasts import Forecasts, Outlook
    from .structure_probe import StructureProbe


class FolderExport(Stage):
    """Base of stages that write a folder: `class MyExport(FolderExport)` fills `self.new_folder(...)` in `run`, and finishes it."""

    abstract = True
    reads_metrics = True

    to: Path = Field(description="Folder to write.")
    overwrite: bool = Field(
        False, description="Replace a folder even if it is not an earlier export, or has been changed since it was exported."
    )

    def forecast(self, inputs: Forecasts) -> Outlook:
        check_target(self.to, self.overwrite)
        return {}

    def inspect(self, inputs: Forecasts, probe: StructureProbe) -> None:
        check_target(self.to, self.overwrite, reads_files=True)

    def writes(self) -> tuple[Path, ...]:
        return (self.to,)

    def new_folder(self, *sources: Path) -> AbstractContextManager[NewFolder]:
        """The folder in the making. `sources`: folders that are read to fill it, and must not be written over."""
        return new_folder(self.to, self.overwrite, *sources)
