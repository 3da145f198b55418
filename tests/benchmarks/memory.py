"""Peak memory of single stages against the memory they are allowed: `python tests/benchmarks/memory.py [CASE ...]`.

Each case runs in a process of its own on a random model of about 40 MB, with so many tokens that what is kept between layers is
many times what is allowed for it. Prints the memory allowed, the peak (VmHWM) and their ratio; the goal is at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 64, "num_local_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 384}


@dataclass(frozen=True)
class Case:
    """A stage on a model."""

    stage: str
    options: dict[str, Any]
    architecture: str = "llama"
    changes: tuple[tuple[str, Any], ...] = ()
    samples: int = 128
    tokens: int = 256
    padded: bool = False
    pruned: bool = False
    room: int = 160
    """MiB allowed above what the program takes before the stage."""


CASES: dict[str, Case] = {
    "forward": Case("shortgpt_score", {"layers": 2}),
    "kept forward": Case("angular_score", {"layers": 2}),
    "backward": Case("gradmap_score", {"layers": 2, "sample_share": 1.0}),
    "backward, padded": Case("gradmap_score", {"layers": 2, "sample_share": 1.0}, padded=True),
    "weight gradients": Case("taylor_score", {"layers": 2}, room=260),
    "eager, windows": Case("gradmap_score", {"layers": 2, "sample_share": 1.0}, "gemma2", padded=True, room=220),
    "eager, sinks": Case(
        "gradmap_score", {"layers": 2, "sample_share": 1.0}, "gpt_oss", (("num_local_experts", 4),), padded=True, room=220
    ),
    "experts": Case("gradmap_score", {"layers": 2, "sample_share": 1.0}, "qwen3_moe", tuple(EXPERTS.items()), room=300),
    "experts, forward": Case("shortgpt_score", {"layers": 2}, "mixtral", (("num_local_experts", 32),), samples=64, room=260),
    "search": Case("sleb_score", {"layers": 1}, samples=128),
    "correction": Case("project_compensate", {}, pruned=True, room=220),
    "correction, deep": Case(
        "project_compensate",
        {},
        changes=(("num_hidden_layers", 100), ("intermediate_size", 2048)),
        samples=16,
        pruned=True,
        room=320,
    ),
    "look ahead": Case("lookahead_score", {"layers": 3}, room=260),
    "look ahead, many words": Case(
        "lookahead_score", {"layers": 2}, changes=(("vocab_size", 65536), ("num_hidden_layers", 6)), samples=48, room=560
    ),
    "merge": Case("mka_merge", {"layers": 2}, room=260),
    "refit": Case("refit_layers", {"steps": 8}, pruned=True, room=260),
    "training": Case("distill", {"samples": 64, "sequence_length": 256, "steps": 4}, samples=8, pruned=True, room=800),
    "training of all weights": Case(
        "distill", {"samples": 64, "sequence_length": 256, "steps": 4, "weights": "all"}, samples=8, pruned=True, room=860
    ),
    "evaluate": Case("evaluate", {"samples": 256, "sequence_length": 256}, samples=8),
}


def make_checkpoint(case: Case, folder: Path) -> None:
    """A random model, and the byte-level tokenizer of the built-in one."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from gradmap_pipeline.checkpoint.source import BUILTIN_FOLDER

    config = AutoConfig.for_model(case.architecture, **{**SHAPE, **dict(case.changes)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in BUILTIN_FOLDER.glob("tokenizer*"):
        shutil.copy(file, folder)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Run the stage in this process; bytes allowed, and the most that were resident."""
    import torch

    from gradmap_pipeline import CalibrationSet, TensorFile
    from gradmap_pipeline.checkpoint.graph import open_folder
    from gradmap_pipeline.machine.memory import give_back, prefer_huge_pages, resident_bytes, tune_allocator
    from gradmap_pipeline.recipe.catalog import load_catalog
    from gradmap_pipeline.sweep.layerwise import LayerwiseModel
    from gradmap_pipeline.testing import make_context

    prefer_huge_pages()
    tune_allocator(is_tight=True)
    torch.set_num_threads(1)
    graph = open_folder(folder / "model", "model", None)
    LayerwiseModel(graph, resident_bytes=0)  # imports what the architecture needs
    if case.pruned:
        graph = graph.without_layers({3, 4})
    ids = torch.randint(3, 2000, (case.samples, case.tokens), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    mask = torch.ones_like(ids, dtype=torch.uint8)
    if case.padded:
        for row in range(case.samples):
            mask[row, case.tokens - row % 40 - 1 :] = 0
    file = TensorFile.save({"input_ids": ids, "attention_mask": mask}, folder / "calibration.safetensors")
    calibration = CalibrationSet(
        tensors=file,
        samples=case.samples,
        sequence_length=case.tokens,
        tokens=int(mask.sum()),
        tokenizer=graph.base.tokenizer_sha256,
        source="random",
    )
    cls = load_catalog().stages[case.stage]
    options = dict(case.options)
    if "dataset" in cls.model_fields:
        options["dataset"] = {"builtin": "calibration"}
    stage = cls.model_validate(options)
    inputs = {name: {"model": graph, "calibration": calibration}[name] for name in cls.Inputs.model_fields if name != "scores"}
    del ids, mask
    give_back()
    memory = resident_bytes() + case.room * MIB
    context = make_context(folder / "step", memory=memory)
    Path("/proc/self/clear_refs").write_text("5")
    outcome = "done"
    try:
        stage.run(cls.Inputs.model_validate(inputs), context)
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    peak = int(status["VmHWM"].split()[0]) << 10
    return {
        "allowed": memory,
        "peak": peak,
        "outcome": outcome,
        "written": resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512,
    }


def measure(name: str) -> dict[str, Any]:
    """Run a case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, __file__, "--inside", name, folder, "--make"]
        subprocess.run(make, check=True, capture_output=True)
        done = subprocess.run([sys.executable, __file__, "--inside", name, folder], check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--inside", nargs=2, metavar=("CASE", "FOLDER"), help="run one case in this process")
    parser.add_argument("--make", action="store_true", help="make the model of the case alone")
    arguments = parser.parse_args()
    if arguments.inside:
        name, folder = arguments.inside
        act: Callable[[], Any] = (
            (lambda: make_checkpoint(CASES[name], Path(folder) / "model"))
            if arguments.make
            else lambda: print(json.dumps(run_case(CASES[name], Path(folder))))
        )
        act()
        return
    print("| case | allowed, MiB | peak, MiB | ratio | outcome |")
    print("|---|---|---|---|---|")
    for name in arguments.cases or CASES:
        measured = measure(name)
        print(
            f"| {name} | {measured['allowed'] >> 20} | {measured['peak'] >> 20} | {measured['peak'] / measured['allowed']:.3f} "
            f"| {measured['outcome'][:100]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
