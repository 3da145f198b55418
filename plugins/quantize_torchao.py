"""Quantise weights to 8 bits with torchao, through transformers' own config, so that plain `from_pretrained` loads the result.

Source: https://github.com/pytorch/ao and https://huggingface.co/docs/transformers/quantization/torchao
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from gradmap_pipeline import Context, ModelGraph, Stage, StageError, TransformersFolder, hookimpl
from gradmap_pipeline.folders import (
    check_loading,
    check_target,
    describe_file,
    finish_export,
    make_lineage,
    write_companions,
)
from gradmap_pipeline.partial import partial_folder, replace_folder

if TYPE_CHECKING:
    import torch

_CHECK_SHAPE = (2, 32)  # sequences, tokens


class QuantizeTorchao(Stage):
    """Quantise linear layers to int8 with torchao; plain transformers loads the folder where torchao is installed."""

    name = "quantize_torchao"
    requires = ("torchao", "accelerate")
    extra = "torchao"
    libraries = ("torch", "transformers", "torchao")

    method: Literal["int8", "int8_dynamic"] = Field(
        "int8",
        description="`int8`: weights alone, by output channel. `int8_dynamic`: activations too, a scale for each token (W8A8).",
    )
    to: Path = Field(description="Folder to write.")
    overwrite: bool = Field(False, description="Replace a folder even if it is not an earlier export.")

    class Inputs(BaseModel):
        model: ModelGraph

    class Outputs(BaseModel):
        model: TransformersFolder

    def forecast(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        check_target(self.to, self.overwrite)
        return {"model": inputs.get("model")}

    def writes(self) -> tuple[Path, ...]:
        return (self.to,)

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from transformers import AutoModelForCausalLM

        from gradmap_pipeline.model.checkpoint import write_folder

        graph, target = inputs.model, self.to.resolve()
        if target == graph.base.folder or target in graph.base.folder.parents:
            raise StageError(f"{str(self.to)!r} holds the model that is being read; write to another folder")
        plain = context.folder / "plain"
        plain.mkdir()
        list(write_folder(graph.export_tensors(), plain, graph.dtype))
        write_companions(graph, None, plain)
        with partial_folder(target) as partial, context.progress("quantise with torchao", 3, "step") as advance:
            before = self._logits(AutoModelForCausalLM.from_pretrained(plain, dtype="auto"), context)
            advance()
            quantised = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", quantization_config=self._config())
            found = self._logits(quantised, context)
            if not found.isfinite().all():
                raise StageError("the quantised model computes values that are not finite; nothing was written")
            write_companions(graph, None, partial)
            quantised.save_pretrained(partial)
            del quantised
            advance()
            check_loading(partial)
            again = self._logits(AutoModelForCausalLM.from_pretrained(partial, dtype="auto"), context)
            if not bool((again == found).all()):
                raise StageError("the quantised folder does not compute what the quantised model does; nothing was written")
            difference = float((found - before).abs().max())
            files = {file.name: describe_file(file) for file in partial.iterdir()}
            lineage = make_lineage(graph, None, files, difference, context) | {"quantisation": f"{self.method} torchao"}
            files = finish_export(partial, lineage, files)
            replace_folder(partial, target)
            advance()
        for file in plain.iterdir():
            file.unlink()
        plain.rmdir()
        size = sum(file.size for file in files.values()) / 1e6
        context.note(f"wrote {self.to}: {size:.1f} MB, loaded back, logits differ from the unquantised by up to {difference:.2g}")
        exported = TransformersFolder(
            graph=graph, folder=target, files=files, max_logit_difference=difference, quantisation=f"{self.method} torchao"
        )
        return self.Outputs(model=exported)

    def _config(self) -> Any:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if self.method == "int8" else Int8DynamicActivationInt8WeightConfig())

    def _logits(self, model: Any, context: Context) -> torch.Tensor:
        import torch

        words = int(model.config.get_text_config().vocab_size)
        ids = torch.randint(words, _CHECK_SHAPE, generator=torch.Generator().manual_seed(context.seed))
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
        return logits


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeTorchao]
