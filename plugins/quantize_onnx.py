"""Quantise the weights of an ONNX graph, in the operators that ONNX Runtime computes with.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    Agreement,
    CalibrationSet,
    Context,
    DatasetSource,
    FolderExport,
    Forecasts,
    OnnxFolder,
    OnnxQuantisation,
    OptionError,
    Outlook,
    QualityError,
    QuantisedGraph,
    Stage,
    TextAgreement,
    check_text,
    check_tokenizer,
    describe_folder,
    extend_lineage,
    hookimpl,
    read_text,
    write_card,
)

_EIGHT_BITS = 0.05
_ADVICE = {"int4": "keep more in 8 bits", "int8": "use a smaller block_size", "int8_dynamic": "use method int8"}
_BLOCK_SIZES = {"int4": 16, "int8": 32, "int8_dynamic": 32}


class QuantizedMatrices(TextAgreement):
    """What was quantised, what was not, and what that costs."""

    quantised: int
    """Matrices in 8 or 4 bits; one that is both head and table of embeddings counts once."""
    in_8_bits: int
    """Matrices among them in 8 bits."""
    left: dict[str, int]
    """Numbers in each constant matrix that stays as it was, by its name in the graph."""


class QuantizeOnnx(FolderExport):
    """Quantise the weights of an exported ONNX graph to 8 or 4 bits, embeddings and head included, and measure what that costs."""

    name = "quantize_onnx"
    requires = ("onnxruntime", "onnx_ir")
    extra = "onnx"
    libraries = ("onnxruntime", "onnx", "torch")
    metric_names = ("agreement", "perplexity_ratio")

    method: Literal["int4", "int8", "int8_dynamic"] = Field(
        "int4",
        description="`int4`, `int8`: weights alone, in blocks with a scale each. `int8_dynamic`: weights by channel, and "
        "activations as they come; embeddings and a head tied to them as with `int8`.",
    )
    block_size: int | None = Field(
        None, ge=16, le=256, description="Weights that share a scale; a power of two. For `int4` and `int8`. Default: 16, 32."
    )
    rounding: Literal["nearest", "least_squares", "gptq"] | None = Field(
        None,
        description="How `int4` and `int8` choose codes. `nearest`: scales from the range of each block. `least_squares`: scales "
        "of least squared error. `gptq`, for `int4`: codes that make up for each other's errors on the calibration set. Default: "
        "`gptq` for `int4` where there is a calibration set, else `least_squares`.",
    )
    eight_bits: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Largest share of the weights that `int4` keeps in 8 bits: the matrices whose products would change most. "
        "Default: 0.05.",
    )
    dataset: DatasetSource = Field(
        default_factory=lambda: DatasetSource(builtin="heldout"), description="Text on which both graphs are compared."
    )
    samples: int = Field(16, ge=1, description="Sequences of that text.")
    sequence_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence. Default: as long as the model is made for, at most 256."
    )
    max_perplexity_ratio: float | None = Field(
        None,
        gt=0,
        description="Largest perplexity that passes, relative to the graph before quantisation.",
        deprecated="write `limits: {perplexity_ratio: {max: …}}` beside the step's `with`",
    )
    min_agreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Least share of tokens for which both graphs choose the same next token.",
        deprecated="write `limits: {agreement: {min: …}}` beside the step's `with`",
    )

    class Inputs(BaseModel):
        exported: OnnxFolder
        calibration: CalibrationSet | None = None

    class Outputs(BaseModel):
        exported: OnnxFolder
        matrices: QuantizedMatrices

    @model_validator(mode="after")
    def _check_combinations(self) -> QuantizeOnnx:
        for option in ("block_size", "rounding"):
            if getattr(self, option) is not None and self.method == "int8_dynamic":
                raise ValueError(f"{option!r} belongs to methods 'int4' and 'int8'; 'int8_dynamic' has a scale for each channel")
        if self.rounding == "gptq" and self.method != "int4":
            raise ValueError(f"rounding 'gptq' belongs to method 'int4'; the method is {self.method!r}")
        if self.eight_bits is not None and self.method != "int4":
            raise ValueError(f"'eight_bits' belongs to method 'int4'; the method is {self.method!r}")
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ValueError(f"'block_size' must be a power of two, found {self.block_size}")
        return self

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        if self.rounding == "gptq" and "calibration" not in inputs:
            raise OptionError("rounding", "gptq needs a calibration set; put calibrate before this step, or use least_squares")
        source = inputs.of(OnnxFolder)
        check_text(self.dataset, self.samples, self.sequence_length, source)
        self._check_source(source.quantisation)
        return {"exported": source.model_copy(update={"quantisation": self.method})}

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        source = inputs.exported
        self._check_source(source.quantisation)
        if inputs.calibration is not None:
            check_tokenizer(inputs.calibration, source.graph)
        with self.new_folder(source.folder, source.graph.base.folder) as new:
            graph = QuantisedGraph(source, new.path)
            quantised = graph.write_graph(self._plan(inputs.calibration), context)
            batches = read_text(source.graph.base, self.dataset, self.samples, self.sequence_length)
            agreement = graph.compare(batches, context)
            counts = {"quantised": quantised.count, "in_8_bits": quantised.in_8_bits, "left": quantised.left}
            matrices = QuantizedMatrices.of(agreement, self.dataset.name, **counts)
            self._check_limits(agreement, is_calibrated=inputs.calibration is not None)
            graph.write_companions(self.method)
            details = self._describe(matrices)
            write_card(new.path, source.graph, context.metrics, "onnx", self.method, details)
            files = describe_folder(new.path)
            lineage = extend_lineage(source.folder, files, agreement.difference, self, context)
            files = new.finish(lineage, files)
        exported = source.model_copy(
            update={"folder": new.target, "files": files, "max_logit_difference": agreement.difference, "quantisation": self.method}
        )
        sizes = f"{exported.size_bytes / 1e6:.1f} MB instead of {source.size_bytes / 1e6:.1f} MB"
        context.note(f"wrote {self.to}{new.replaced}: weights of {sizes}")
        for detail in details:
            context.note(detail)
        return self.Outputs(exported=exported, matrices=matrices.model_copy(update={"model": exported.digest}))

    def _check_source(self, quantisation: str | None) -> None:
        if quantisation is not None:
            raise OptionError("method", f"the graph is quantised already ({quantisation}); quantise the export it was made from")

    def _plan(self, calibration: CalibrationSet | None) -> OnnxQuantisation:
        default: Literal["least_squares", "gptq"] = "gptq" if self.method == "int4" and calibration is not None else "least_squares"
        uses_text = self.method == "int4" and calibration is not None
        return OnnxQuantisation(
            self.method,
            self.block_size or _BLOCK_SIZES[self.method],
            self.rounding or default,
            _EIGHT_BITS if self.eight_bits is None else self.eight_bits,
            calibration.load() if uses_text and calibration is not None else None,
        )

    def _describe(self, matrices: QuantizedMatrices) -> tuple[str, ...]:
        """What was done and what it costs, in sentences."""
        bits = f", {matrices.in_8_bits} of them in 8 bits" if self.method == "int4" and matrices.in_8_bits else ""
        left = [f"{name} of {count:,} numbers" for name, count in matrices.left.items()]
        stays = f"; in floating point: {', '.join(left[:3])}{f' and {len(left) - 3} more' if len(left) > 3 else ''}" if left else ""
        return (f"{matrices.quantised} matrices quantised{bits}{stays or ', none left in floating point'}", str(matrices))

    def _check_limits(self, agreement: Agreement, *, is_calibrated: bool) -> None:
        limits = vars(self)  # an attribute that is deprecated would warn
        missed = agreement.find_missed(self.dataset.name, limits["max_perplexity_ratio"], limits["min_agreement"])
        if missed:
            advice = _ADVICE[self.method]
            if self.method == "int4":
                advice += ", calibrate on more text" if is_calibrated else ", put calibrate before this step"
            raise QualityError(f"{'; '.join(missed)}; {advice}, or change the limit; nothing was written")


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeOnnx]
