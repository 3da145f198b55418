"""Quantise a GGUF file with llama.cpp's own quantiser.

Source: https://github.com/ggml-org/llama.cpp (tools/quantize). It is used where the user has it, as a program or within
llama-cpp-python, and never copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    LINEAGE,
    Context,
    DatasetSource,
    FileAgreement,
    FolderExport,
    Forecasts,
    GgufFolder,
    GgufQuantiser,
    OptionError,
    Outlook,
    QualityError,
    Stage,
    TextAgreement,
    check_text,
    copy_files,
    describe_folder,
    extend_lineage,
    hookimpl,
    known,
    read_text,
    write_card,
)

Kind = Literal[
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "iq4_xs", "iq4_nl", "q3_k_m", "q3_k_s", "q2_k"
]
PLAIN = ("f32", "f16", "bf16")


class QuantizeGguf(FolderExport):
    """Quantise an exported GGUF file with llama.cpp's own quantiser, and run it beside the file it was made from."""

    name = "quantize_gguf"
    libraries = ()
    metric_names = ("agreement", "perplexity_ratio")

    type: Kind = Field("q4_k_m", description="Type of the weights in the file, by llama.cpp's name.")
    program: Path | None = Field(
        None,
        description="llama.cpp's `llama-quantize`. Default: the one that is found on the search path for programs, else the "
        "quantiser within llama-cpp-python.",
    )
    python: Path | None = Field(
        None, description="Python with llama-cpp-python, to run the files and to quantise without the program. Default: this one."
    )
    dataset: DatasetSource | None = Field(
        None, description="Text on which both files are compared. Default: none; random prompts, which say less."
    )
    samples: int = Field(16, ge=1, description="Sequences of that text.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence. Default: as long as the model is made for, at most 256."
    )
    max_perplexity_ratio: float | None = Field(
        None,
        gt=0,
        description="Largest perplexity on the text that passes, relative to the file before quantisation.",
        deprecated="write `limits: {perplexity_ratio: {max: …}}` beside the step's `with`",
    )
    min_agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Least share of tokens of the text, or of positions of random prompts, for which both files find the same next "
        "token likeliest.",
        deprecated="write `limits: {agreement: {min: …}}` beside the step's `with`",
    )

    class Inputs(BaseModel):
        exported: GgufFolder

    class Outputs(BaseModel):
        exported: GgufFolder
        agreement: FileAgreement | None = None
        on_text: TextAgreement | None = None

    @model_validator(mode="after")
    def _check_combinations(self) -> QuantizeGguf:
        for option in ("samples", "sequence_length", "max_perplexity_ratio"):
            if self.dataset is None and option in self.model_fields_set:
                raise ValueError(f"{option!r} belongs to 'dataset', which is not set")
        return self

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        self._quantiser.check()
        for option in ("dataset", "min_agreement"):
            if vars(self)[option] is not None and self._quantiser.runner is None:
                raise OptionError(option, self._quantiser.explain_no_runner())
        source = inputs.of(GgufFolder)
        if self.dataset is not None:
            check_text(self.dataset, self.samples, self.sequence_length, source)
        self._check_source(known(source.type))
        python = self._quantiser.runner or (str(self.python) if self.python else source.python)
        return {"exported": source.model_copy(update={"type": self.type, "quantisation": self.type, "python": python})}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return () if self._quantiser.runner else (self._quantiser.explain_no_runner(),)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        source = inputs.exported
        self._check_source(source.type)
        runner = self._quantiser.runner
        with self.new_folder(source.folder, source.graph.base.folder) as new:
            file = new.path / f"model-{self.type}.gguf"
            self._quantiser.quantise(source.file, file, self.type)
            agreement, difference = (None, None) if runner is None else self._compare(source, file, runner, context)
            copy_files(source.folder, (name for name in source.files if name != LINEAGE and not name.endswith(".gguf")), new.path)
            told = () if agreement is None else (str(agreement), f"logits differ by up to {difference:.2g}")
            details = (f"made from a file of type {source.type.upper()}", *told)
            write_card(new.path, source.graph, context.metrics, "gguf", self.type.upper(), details)
            files = describe_folder(new.path)
            lineage = extend_lineage(source.folder, files, difference, self, context)
            lineage["llama_cpp"] = None if agreement is None else agreement.model_dump(exclude={"model"})
            files = new.finish(lineage, files)
        size = sum(written.size for written in files.values()) / 1e6
        context.note(
            f"wrote {self.to}{new.replaced}: {size:.1f} MB of files, {', '.join(told) or self._quantiser.explain_no_runner()}"
        )
        update = {"folder": new.target, "files": files, "max_logit_difference": difference, "quantisation": self.type}
        exported = source.model_copy(update={**update, "type": self.type, "python": runner or source.python})
        if agreement is None:
            return self.Outputs(exported=exported)
        agreement = agreement.model_copy(update={"model": exported.digest})
        if isinstance(agreement, TextAgreement):
            return self.Outputs(exported=exported, on_text=agreement)
        return self.Outputs(exported=exported, agreement=agreement)

    def _check_source(self, source_type: str) -> None:
        if source_type not in PLAIN:
            raise OptionError("type", f"the file is quantised already ({source_type}); quantise one of type {' or '.join(PLAIN)}")

    def _compare(
        self, source: GgufFolder, file: Path, runner: str, context: Context
    ) -> tuple[FileAgreement | TextAgreement, float]:
        """What quantisation costs, and the largest difference of logits."""
        if self.dataset is not None:
            return self._compare_on_text(source, file, runner, self.dataset, context)
        agreement = self._quantiser.compare_on_prompts(source, file, runner, context)
        least = self._limits["min_agreement"]
        if least is not None and agreement.agreeing < least:
            self._refuse(
                f"{self.type} finds the same token likeliest at {agreement.agreeing:.3f} of positions of random prompts, under "
                f"min_agreement {least:g}"
            )
        return agreement, agreement.difference

    def _compare_on_text(
        self, source: GgufFolder, file: Path, runner: str, dataset: DatasetSource, context: Context
    ) -> tuple[TextAgreement, float]:
        batches = read_text(source.graph.base, dataset, self.samples, self.sequence_length)
        comparison = self._quantiser.compare_on_text(source, file, runner, batches, context)
        missed = comparison.find_missed(dataset.name, self._limits["max_perplexity_ratio"], self._limits["min_agreement"])
        if missed:
            self._refuse("; ".join(missed))
        return TextAgreement.of(comparison, dataset.name), comparison.difference

    def _refuse(self, missed: str) -> NoReturn:
        raise QualityError(f"{missed}; choose a type of more bits, or change the limit; nothing was written")

    @property
    def _limits(self) -> dict[str, Any]:
        """Options that are deprecated; as attributes they would warn."""
        return vars(self)

    @property
    def _quantiser(self) -> GgufQuantiser:
        return GgufQuantiser(self.program, self.python)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeGguf]
