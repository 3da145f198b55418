"""Write a model as an ONNX graph, in a process of its own where its weights are large.

A tracer keeps more than its graph: rules that rewrite graphs hold on to the last one they saw, weights included. What
another process held is gone when it ends, so the weights are never in memory twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import errors
from ...checkpoint.graph import ModelGraph
from ...errors import CapacityError, GradmapError, StageError
from ...machine.atomic_folder import scratch_folder
from ...machine.memory import give_back, tune_allocator
from ...machine.processes import explain_end, tie
from ...machine.shortages import find_shortage
from .genai import make_genai_config
from .layout import name_data
from .parity import Reference, make_references
from .trace import takes_positions, trace

if TYPE_CHECKING:
    import torch

ROOM = 1 << 28
"""Bytes of weights from which a process of its own is worth the seconds it takes to start."""
_COMMAND = (sys.executable, "-m", __name__)
_REQUEST, _ANSWER, _TENSORS, _LOG = "request.json", "answer.json", "references.safetensors", "log.txt"


_TRACER = 1 << 28
"""Bytes of a traced graph of some dozens of layers, without its weights."""


def estimate_tracing_memory(weights: int, program: int) -> int:
    """Bytes resident at the peak, in all processes, for so many bytes of weights; `program`: of a process without a model."""
    return weights + _TRACER + program * (1 if weights < ROOM else 2)


def write_graph(model: ModelGraph, dtype: str, seed: int, graph: Path) -> tuple[list[Reference], dict[str, Any]]:
    """Write the graph to this file and its weights beside it.

    Returns what torch computes in the cases to compare, and ONNX Runtime GenAI's config.
    """
    if model.count_parameters() * (4 if dtype == "float32" else 2) < ROOM:
        return _write_here(model, dtype, seed, graph)
    with scratch_folder() as place:
        request = {"model": model.model_dump(mode="json"), "dtype": dtype, "seed": seed, "graph": str(graph)}
        request["threads"] = _count_threads()
        (place / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        code = _run([*_COMMAND, str(place)], place / _LOG)
        if not (place / _ANSWER).is_file():
            raise explain_end("the tracer", code, (place / _LOG).read_text(encoding="utf-8", errors="replace"))
        answer = json.loads((place / _ANSWER).read_text(encoding="utf-8"))
        if "error" in answer:
            raise getattr(errors, answer["error"], StageError)(answer["message"])
        return _load_references(place, answer["cases"]), answer["genai"]


def _run(command: list[str], log: Path) -> int:
    """Run a program that ends when its standard input does, which this process holds open. Returns its exit code."""
    with log.open("w") as output:
        process = subprocess.Popen(tie(command), stdin=subprocess.PIPE, stdout=output, stderr=output)
        try:
            return process.wait()
        finally:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _write_here(model: ModelGraph, dtype: str, seed: int, file: Path) -> tuple[list[Reference], dict[str, Any]]:
    import onnx_ir

    from ...checkpoint.whole import load_whole

    whole = load_whole(model, dtype, remedy="use onnx: {{dtype: float32}}")
    give_back()
    references = make_references(whole, seed)
    graph = trace(whole)
    genai = make_genai_config(whole.config.get_text_config(), positions=takes_positions(whole))
    onnx_ir.save(graph, file, external_data=name_data(file.name))
    del graph, whole
    give_back()
    return references, genai


def _count_threads() -> int:
    import torch

    return torch.get_num_threads()


def _save_references(references: list[Reference], place: Path) -> list[str]:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for number, reference in enumerate(references):
        named = {"ids": reference.input_ids, "mask": reference.mask}
        named |= {f"logits.{step}": logits for step, logits in enumerate(reference.logits)}
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in named.items()}
    save_file(tensors, place / _TENSORS)
    return [reference.name for reference in references]


def _load_references(place: Path, cases: list[str]) -> list[Reference]:
    from safetensors.torch import load_file

    tensors = {name: tensor.clone() for name, tensor in load_file(place / _TENSORS).items()}
    references = []
    for number, case in enumerate(cases):
        steps = sum(name.startswith(f"{number}.logits.") for name in tensors)
        logits = [tensors[f"{number}.logits.{step}"] for step in range(steps)]
        references.append(Reference(case, tensors[f"{number}.ids"], tensors[f"{number}.mask"], logits))
    return references


def main() -> None:
    """The other process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    tune_allocator(is_tight=True)
    place = Path(sys.argv[1])
    request = json.loads((place / _REQUEST).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    try:
        model = ModelGraph.model_validate(request["model"])
        references, genai = _write_here(model, request["dtype"], request["seed"], Path(request["graph"]))
        answer: dict[str, Any] = {"cases": _save_references(references, place), "genai": genai}
    except Exception as error:
        shortage = None if isinstance(error, CapacityError) else find_shortage(error)
        if shortage is not None:
            answer = {"error": CapacityError.__name__, "message": f"tracing {shortage.explain([Path(request['graph']).parent])}"}
        elif isinstance(error, GradmapError):
            answer = {"error": type(error).__name__, "message": str(error)}
        else:
            raise
    (place / _ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _end_with_parent() -> None:
    while os.read(0, 1):  # not through sys.stdin, whose lock Python needs when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
