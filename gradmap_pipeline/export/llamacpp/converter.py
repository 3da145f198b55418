"""llama.cpp's converter: found, asked whether it takes a model, and run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.companions import find_licences
from ...checkpoint.depth import prune_fields
from ...errors import ModelError, OptionError, StageError
from ...machine.processes import explain_end, tie
from ..folders import write_companions
from . import pythons
from .dry_run import explain_failure
from .limits import explain_refusal, find_arrays
from .parity import Parity, measure_parity

if TYPE_CHECKING:
    from ...checkpoint.forecast import ModelForecast
    from ...checkpoint.graph import ModelGraph
    from ...context import Context

CONVERTER = "convert_hf_to_gguf.py"
_MAGIC = b"GGUF"
_SIZE = re.compile(r"-(a|\d+x)?\d+([._]\d+)?[kmbt]\d?(?=-|$)", re.IGNORECASE)
"""The size in a model's name: `-135M`, `-8x7B`."""


@dataclass(frozen=True)
class GgufConverter(pythons.RunsInPython):
    """llama.cpp's converter and the Python that runs it, as a step names them by its options `converter` and `python`.

    Every method raises `OptionError` where there is no such program, and `StageError` where one fails.
    """

    converter: Path | None
    """The program, or the folder that has it; None: the one on the search path for programs."""
    python: Path | None
    """None: this one."""

    def check(self, model: ModelForecast) -> None:
        """Raise `OptionError` where the programs cannot run, or do not take a model as a plan knows it."""
        pythons.check_program("python", self.python)
        converter = self._find_converter()
        missing = pythons.explain_missing(self.python_path, converter)
        if missing is not None:
            raise OptionError("python", missing)
        if model.config is not None and model.kept is not None:
            self.prune_config(model.config, model.kept)
        for architecture in (model.config or {}).get("architectures") or ():
            if not pythons.knows(converter, architecture):
                raise OptionError("converter", f"llama.cpp's converter does not know {architecture}; export in another format")

    def check_whole(self, graph: ModelGraph) -> None:
        """Raise `OptionError` where the converter, run on names and shapes alone, does not take the model."""
        failure = explain_failure(graph, self._find_converter(), self.python_path)
        if failure is not None:
            raise OptionError("converter", f"{failure}; export in another format")

    def prune_config(self, config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
        """The config of the kept layers. Raises `OptionError` where llama.cpp would compute another model."""
        try:
            left = prune_fields(dict(config), dict(config), kept)
        except ModelError:  # refused where layers are removed
            return dict(config)
        reason = explain_refusal(left)
        if reason is not None:
            raise OptionError("to", f"{reason}; export in another format")
        return left

    def write_file(self, graph: ModelGraph, file: Path, weights: str, config: Mapping[str, Any], context: Context) -> list[str]:
        """Write the file, and licences beside it; return the keys that the file has besides those of the converter.

        `weights`: type in the file, by the converter's name. `config`: what `prune_config` returned.
        """
        from ...checkpoint.checkpoint import write_folder

        name = Path(graph.base.name if graph.base.from_hub else graph.base.folder.resolve()).name
        scratch = context.folder / "plain"
        plain = scratch / _SIZE.sub("", name)  # what the converter takes basename and size from; that of what is left it counts
        plain.mkdir(parents=True)
        try:
            list(write_folder(graph.export_tensors(), plain, graph.dtype))
            write_companions(graph, plain)
            arrays = self._convert(plain, file, weights, config, name)
        finally:
            shutil.rmtree(scratch)
        for licence in find_licences(graph.base.folder):
            shutil.copyfile(licence, file.parent / licence.name)
        return arrays

    def run_file(self, graph: ModelGraph, file: Path, weights: str, runner: str, context: Context) -> Parity:
        """Run the file beside the model on random prompts. Raises `StageError` where it computes something else."""
        with context.progress("run the GGUF file", 1, "file") as advance:
            parity = measure_parity(graph, file, weights, runner, context.seed)
            advance()
        return parity

    def _find_converter(self) -> Path:
        if self.converter is not None:
            file = self.converter / CONVERTER if self.converter.is_dir() else self.converter
            pythons.check_converter(file)
            return file
        on_path = shutil.which(CONVERTER)
        if on_path is None:
            raise OptionError(
                "converter",
                f"{CONVERTER} is not on the search path for programs: git clone https://github.com/ggml-org/llama.cpp, and set "
                "`converter: llama.cpp`",
            )
        return Path(on_path)

    def _convert(self, folder: Path, file: Path, weights: str, config: Mapping[str, Any], name: str) -> list[str]:
        """Write the file, which names the model so; return the keys that it has besides those of the converter."""
        arrays = find_arrays(config)
        made = file.with_name(f"converted-{file.name}") if arrays else file
        converter = self._find_converter()
        options = ["--outfile", str(made), "--outtype", weights]
        if pythons.takes_name(converter):
            options.append(f"{pythons.NAME_OPTION}={name}")  # one word, as a name may start with a hyphen
        self._start("llama.cpp's converter", str(converter), str(folder), *options)
        if not made.is_file() or not _starts_as_gguf(made):
            raise StageError("llama.cpp's converter ended without an error, and without a GGUF file; nothing was written")
        if arrays:
            self._start(
                "rewriting the GGUF file",
                str(pythons.REWRITER),
                str(made),
                str(file),
                json.dumps(arrays),
                *pythons.find_modules(converter),
            )
            made.unlink()
        return list(arrays)

    def _start(self, name: str, *arguments: str) -> None:
        done = subprocess.run(tie([self.python_path, *arguments]), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise explain_end(name, done.returncode, done.stderr or "it said nothing")


def _starts_as_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC
