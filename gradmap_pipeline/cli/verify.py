"""The command that looks an exported folder over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command_options import parse_path
from .ending import endings


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", parser=parse_path, help="An exported folder.", show_default=False)],
) -> None:
    """Check an exported folder: every file as it was written, and the model loads."""
    with endings():
        from ..export.verify import verify_folder
        from ..report.console import print_line
        from ..run.listening import heard

        with heard(lambda text: print_line(f"note: {text}")):
            for line in verify_folder(folder):
                print_line(line)
