"""Quantise linear layers with llm-compressor, to the compressed-tensors format that transformers and vLLM load.

Source: https://github.com/vllm-project/llm-compressor; GPTQ: https://arxiv.org/abs/2210.17323; SmoothQuant:
https://arxiv.org/abs/2211.10438. Its pins exclude newer transformers, so the stage runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import (
    CalibrationSet,
    Context,
    Environment,
    FolderExport,
    Forecasts,
    ModelGraph,
    OptionError,
    Outlook,
    Stage,
    TransformersFolder,
    check_tokenizer,
    explain_forecast,
    hookimpl,
    load_folder,
    write_quantised,
)

_GROUP_SIZES = (128, 64, 32, 16)
_ROUNDING = 0.02
"""Activations are rounded again on loading, and a value between two steps may fall to the other side."""


class QuantizeLlmcompressor(FolderExport):
    """Quantise linear layers with llm-compressor (GPTQ, round to nearest, SmoothQuant, FP8) to compressed-tensors."""

    name = "quantize_llmcompressor"
    libraries = ("torch", "transformers")
    environment = Environment(("llmcompressor==0.14.0",))
    requires = ("compressed_tensors",)
    extra = "llmcompressor"

    scheme: Literal["w4a16", "w8a16", "w8a8", "fp8"] = Field(
        "w4a16",
        description="Bits of weights (w) and activations (a). `w4a16`, `w8a16`: integers with a scale for each group of inputs. "
        "`w8a8`: integers, activations with a scale for each token. `fp8`: 8-bit floating point, weights and activations.",
    )
    method: Literal["gptq", "rtn"] | None = Field(
        None,
        description="`gptq` rounds so that errors cancel, on the calibration set; `rtn` to nearest. Default: gptq, rtn for fp8.",
    )
    smoothquant: float | None = Field(
        None, gt=0, lt=1, description="Share of the activations' range to move into weights first (SmoothQuant); for w8a8."
    )
    group_size: int | None = Field(
        None,
        ge=1,
        description="Inputs that share a scale in w4a16 and w8a16. Default: the largest of 128, 64, 32, 16 that divides.",
    )
    ignore: list[str] = Field(["lm_head"], description="Modules to leave as they are: names, or `re:` and a regular expression.")

    class Inputs(BaseModel):
        model: ModelGraph
        calibration: CalibrationSet | None = None

    class Outputs(BaseModel):
        model: TransformersFolder

    @model_validator(mode="after")
    def _check_combinations(self) -> QuantizeLlmcompressor:
        if self.smoothquant is not None and self.scheme != "w8a8":
            raise ValueError(f"'smoothquant' belongs to scheme 'w8a8'; the scheme is {self.scheme!r}")
        if self.group_size is not None and not self._is_grouped:
            raise ValueError(f"'group_size' belongs to schemes 'w4a16' and 'w8a16'; the scheme is {self.scheme!r}")
        if self.scheme == "fp8" and self.method == "gptq":
            raise ValueError("scheme 'fp8' rounds to nearest; leave 'method' out, or choose an integer scheme")
        return self

    @property
    def _is_grouped(self) -> bool:
        return self.scheme in ("w4a16", "w8a16")

    @property
    def _method(self) -> str:
        return self.method or ("rtn" if self.scheme == "fp8" else "gptq")

    @property
    def _label(self) -> str:
        """What is done to the weights, for tables."""
        return " ".join([self.scheme, self._method, *(["smoothquant"] if self.smoothquant is not None else [])])

    @property
    def _needs_data(self) -> bool:
        return self._method == "gptq" or self.smoothquant is not None

    def forecast(self, inputs: Forecasts) -> Outlook:
        super().forecast(inputs)
        if self._needs_data and "calibration" not in inputs:
            option = "method" if self._method == "gptq" else "smoothquant"
            raise OptionError(option, "needs a calibration set; put calibrate before this step, or use method: rtn")
        return {"model": TransformersFolder.Forecast.of(inputs.of(ModelGraph), quantisation=self._label)}

    def advise(self, inputs: Forecasts) -> Sequence[str]:
        return explain_forecast(inputs.of(ModelGraph))

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        if inputs.calibration is not None:
            check_tokenizer(inputs.calibration, inputs.model)

        def quantise(folder: Path) -> Any:
            from llmcompressor import oneshot

            model = load_folder(folder)
            data: dict[str, Any] = {}
            if inputs.calibration is not None and self._needs_data:
                data = _make_data(inputs.calibration)
            oneshot(model=model, recipe=self._make_recipe(model), trust_remote_code_model=False, **data)
            return model

        with self.new_folder(inputs.model.base.folder) as new:
            exported = write_quantised(
                inputs.model,
                new,
                "compressed-tensors",
                self._label,
                quantise,
                self,
                context,
                tolerance=_ROUNDING,
                save_compressed=True,
            )
        return self.Outputs(model=exported)

    def _make_recipe(self, model: Any) -> list[Any]:
        """llm-compressor's modifiers, in order."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        if self._is_grouped:
            weights = QuantizationArgs(
                num_bits=4 if self.scheme == "w4a16" else 8, strategy="group", group_size=self._choose_group_size(model)
            )
            scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        else:
            scheme = preset_name_to_scheme("W8A8" if self.scheme == "w8a8" else "FP8_DYNAMIC", ["Linear"])
        modifiers: list[Any] = []
        if self.smoothquant is not None:
            modifiers.append(SmoothQuantModifier(smoothing_strength=self.smoothquant))
        modifier = GPTQModifier if self._method == "gptq" else QuantizationModifier
        return [*modifiers, modifier(config_groups={"group_0": scheme}, ignore=self.ignore)]

    def _choose_group_size(self, model: Any) -> int:
        import torch
        from compressed_tensors.utils import match_named_modules

        linear = match_named_modules(model, ["Linear"], self.ignore)
        widths = {name: module.in_features for name, module in linear if isinstance(module, torch.nn.Linear)}
        sizes = _GROUP_SIZES if self.group_size is None else (self.group_size,)
        for size in sizes:
            if all(width % size == 0 for width in widths.values()):
                return size
        name, width = next((name, width) for name, width in widths.items() if width % sizes[-1])
        tried = " or ".join(map(str, sizes))
        raise OptionError(
            "group_size", f"{name!r} has {width} inputs, which groups of {tried} do not divide; set another, or ignore it"
        )


def _make_data(calibration: CalibrationSet) -> dict[str, Any]:
    """The recipe's calibration set as llm-compressor takes it; padding stays masked."""
    from datasets import Dataset

    ids, mask = calibration.load()
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist()})
    samples, length = ids.shape
    return {"dataset": rows, "num_calibration_samples": samples, "max_seq_length": length, "shuffle_calibration_samples": False}


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeLlmcompressor]
