"""Quantise the weights of an ONNX graph with ONNX Runtime's tools.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, model_validator

from gradmap_pipeline import Artifact, Context, FolderExport, OnnxFolder, Stage, StageError, hookimpl
from gradmap_pipeline.artifacts import LINEAGE
from gradmap_pipeline.folders import extend_lineage
from gradmap_pipeline.targets import copy_files, describe_folder

_BITS = {"int4": 4, "int8": 8}


class QuantizedMatrices(Artifact):
    """What was quantised, and what was not."""

    quantised: int
    """Products with a constant matrix whose matrix was quantised."""
    left: tuple[str, ...]
    """Constant matrices that were not, by name and shape: the product they are in has no quantised form."""
    rewritten: int
    """Products that were brought into the form that can be quantised."""


class QuantizeOnnx(FolderExport):
    """Quantise the weights of an exported ONNX graph to 8 or 4 bits."""

    name = "quantize_onnx"
    requires = ("onnxruntime", "onnx_ir")
    extra = "onnx"
    libraries = ("onnxruntime", "onnx")

    method: Literal["int4", "int8", "int8_dynamic"] = Field(
        "int4",
        description="`int4`, `int8`: weights alone, in blocks with a scale each. `int8_dynamic`: weights by channel, and "
        "activations as they come.",
    )
    block_size: int | None = Field(
        None, ge=16, le=256, description="Weights that share a scale; a power of two. For `int4` and `int8`. Default: 32."
    )

    class Inputs(BaseModel):
        exported: OnnxFolder

    class Outputs(BaseModel):
        exported: OnnxFolder
        matrices: QuantizedMatrices

    @model_validator(mode="after")
    def _check_combinations(self) -> QuantizeOnnx:
        if self.block_size is not None and self.method == "int8_dynamic":
            raise ValueError("'block_size' belongs to methods 'int4' and 'int8'; 'int8_dynamic' has a scale for each channel")
        if self.block_size is not None and self.block_size & (self.block_size - 1):
            raise ValueError(f"'block_size' must be a power of two, found {self.block_size}")
        return self

    def run(self, inputs: Inputs, context: Context) -> Outputs:
        from gradmap_pipeline.ort.layout import find_graph, is_graph, layout_of, place_graph, tell_programs
        from gradmap_pipeline.ort.parity import measure_difference
        from gradmap_pipeline.ort.session import OnnxSession

        source = inputs.exported
        if source.quantisation is not None:
            raise StageError(
                f"{str(source.folder)!r} is quantised already ({source.quantisation}); quantise the export it was made from"
            )
        with self.new_folder(source.folder, source.graph.base.folder) as new:
            partial = new.path
            graph = partial / place_graph(layout_of(source.folder), source.dtype, self.method)
            graph.parent.mkdir(exist_ok=True)
            rewritten = self._quantise(find_graph(source.folder), graph, context)
            matrices = count_matrices(graph, rewritten)
            if not matrices.quantised:
                raise StageError(
                    "the graph has no product with a constant matrix that ONNX Runtime can quantise; nothing was written"
                )
            difference = measure_difference(
                OnnxSession(source.folder, fast=False), OnnxSession(partial, fast=False), source.graph.base.folder, context.seed
            )
            copy_files(source.folder, (name for name in source.files if name != LINEAGE and not is_graph(name)), partial)
            tell_programs(partial, source.dtype, self.method)
            files = describe_folder(partial)
            lineage = extend_lineage(source.folder, self.model_dump(mode="json"), self.name, files, difference)
            files = new.finish(lineage, files)
        size = sum(file.size for file in files.values()) / 1e6
        context.note(
            f"wrote {self.to}: {size:.1f} MB, {matrices.quantised} matrices quantised, {len(matrices.left)} not"
            f"{f' ({matrices.left[0]}, …)' if matrices.left else ''}, logits differ by up to {difference:.2g}"
        )
        exported = source.model_copy(
            update={"folder": new.target, "files": files, "max_logit_difference": difference, "quantisation": self.method}
        )
        return self.Outputs(exported=exported, matrices=matrices)

    def _quantise(self, source: Path, target: Path, context: Context) -> int:
        """Write the quantised graph and its weights beside it; return how many products had to be rewritten for it."""
        import onnx_ir

        from gradmap_pipeline.ort.layout import name_data
        from gradmap_pipeline.ort.rewrite import unify_products

        logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
        logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
        model = onnx_ir.load(source)
        rewritten = unify_products(model)
        plain, quantised = context.folder / "plain.onnx", context.folder / "quantised.onnx"
        onnx_ir.save(model, plain, external_data=name_data(plain.name))
        del model
        if self.method == "int8_dynamic":
            quantise_dynamically(plain, quantised)
        else:
            quantise_blocks(plain, quantised, _BITS[self.method], self.block_size or 32)
        onnx_ir.save(onnx_ir.load(quantised), target, external_data=name_data(target.name))
        for file in context.folder.iterdir():
            file.unlink()
        return rewritten


def quantise_dynamically(source: Path, target: Path) -> None:
    """Weights to int8 by output channel; activations are quantised while the graph runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True)


def quantise_blocks(source: Path, target: Path, bits: int, block_size: int) -> None:
    """Weights of products to `bits` bits, symmetric, `block_size` of them to a scale."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, accuracy_level=4, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target), use_external_data_format=True)


def count_matrices(graph: Path, rewritten: int) -> QuantizedMatrices:
    """Look through a quantised graph for matrices that still are floating-point numbers."""
    import onnx_ir

    model = onnx_ir.load(graph)
    quantised, left = 0, []
    for node in model.graph:
        if node.op_type in ("MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "QGemm"):
            quantised += 1
        elif node.op_type in ("MatMul", "Gemm"):
            for value in node.inputs:
                if value is not None and value.const_value is not None and len(value.const_value.shape) == 2:
                    left.append(f"{value.name} {'x'.join(map(str, value.const_value.shape))}")
    return QuantizedMatrices(quantised=quantised, left=tuple(left), rewritten=rewritten)


@hookimpl
def gradmap_stages() -> list[type[Stage]]:
    return [QuantizeOnnx]
