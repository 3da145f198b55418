"""llama.cpp's quantiser: found, run, and its files run beside those that they are made from."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...artifacts import Artifact
from ...errors import OptionError, StageError
from ...machine.processes import explain_end, tie
from ...metrics import Metric
from ..agreement import Agreement, compare_models
from . import pythons
from .parity import STEPS, compare_files
from .session import GgufSession

if TYPE_CHECKING:
    from ...batches import Batch
    from ...context import Context
    from ..agreement import Run
    from ..exports import GgufFolder

PROGRAM = "llama-quantize"


class FileAgreement(Artifact):
    """What running the quantised file beside the one it was made from gave, at the last nine positions of random prompts.

    Its metric is `agreement`, where it says of which model.
    """

    lengths: tuple[int, ...]
    """Lengths of the prompts, in tokens."""
    difference: float
    """Largest absolute difference of logits."""
    log_probability_difference: float
    """Largest absolute difference of the log-probability of the likeliest token, in nats."""
    agreeing: float
    """Share of positions at which both find the same token likeliest."""
    lost: float
    """Most that the log-probability loses, in nats, where the likeliest token of the quantised file is taken."""
    model: str | None = None
    """Digest of the quantised file's folder."""

    @property
    def positions(self) -> int:
        """Positions at which the files were compared."""
        return len(self.lengths) * (STEPS + 1)

    def list_metrics(self) -> Sequence[Metric]:
        if self.model is None:
            return ()
        setting = f"{self.positions} positions"
        return (Metric(name="agreement", value=self.agreeing, better="higher", on="random prompts", setting=setting),)

    def __str__(self) -> str:
        return (
            f"at {self.positions} positions of random prompts, {self.agreeing:.0%} of likeliest tokens are those "
            "of the file before quantisation"
        )


@dataclass(frozen=True)
class GgufQuantiser(pythons.RunsInPython):
    """llama.cpp's quantiser and the Python with its bindings, as a step names them by its options `program` and `python`."""

    program: Path | None
    """None: the one on the search path for programs, else the quantiser within llama-cpp-python."""
    python: Path | None
    """None: this one."""

    def check(self) -> None:
        """Raise `OptionError` where there is no quantiser."""
        pythons.check_program("program", self.program)
        pythons.check_program("python", self.python)
        if self._find_program() is None and self.runner is None:
            python = self.python_path
            raise OptionError(
                "program",
                f"{PROGRAM} is not on the search path for programs, and {python!r} lacks {pythons.BINDINGS}, which holds the "
                f"same quantiser: {python} -m pip install {pythons.BINDINGS}",
            )

    def quantise(self, source: Path, target: Path, weights: str) -> None:
        """Write a quantised file. `weights`: its type, by llama.cpp's name, in any case."""
        program = self._find_program()
        command = [program] if program else [self.runner or self.python_path, str(pythons.QUANTIZER)]
        said = subprocess.run(
            tie([*command, str(source), str(target), weights.upper(), str(_count_threads())]),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if said.returncode:
            raise explain_end("llama.cpp's quantiser", said.returncode, said.stderr or said.stdout or "it said nothing")
        if not target.is_file():
            raise StageError("llama.cpp's quantiser ended without an error, and without a file; nothing was written")

    def compare_on_prompts(self, source: GgufFolder, file: Path, runner: str, context: Context) -> FileAgreement:
        """Run a quantised file beside the one that it is made from, on random prompts."""
        with context.progress("run both GGUF files", 1, "pair") as advance:
            agreement = FileAgreement(**compare_files(source.graph, source.file, file, runner, context.seed).as_json())
            advance()
        return agreement

    def compare_on_text(self, source: GgufFolder, file: Path, runner: str, batches: list[Batch], context: Context) -> Agreement:
        """Run a quantised file beside the one that it is made from, on a text."""
        with (
            GgufSession(source.file, runner) as plain,
            GgufSession(file, runner) as quantised,
            context.progress("compare both GGUF files", len(batches), "batch") as advance,
        ):
            return compare_models(_run_in(plain), _run_in(quantised), batches, advance)

    def _find_program(self) -> str | None:
        return str(self.program) if self.program is not None else shutil.which(PROGRAM)


def _run_in(session: GgufSession) -> Run:
    return lambda batch: session.run_batch(batch.input_ids)


def _count_threads() -> int:
    import torch

    return torch.get_num_threads()
