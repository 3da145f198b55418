"""Score layers with the sweep, against a plain forward and backward: `python tests/benchmarks/sweep_speed.py`.

A Llama of 54 M parameters on the same batches, in the same process, in turn. Plain: `loss.backward()` of the whole model,
with gradients of hidden states and none of weights, which the gate metric does not need. Prints the median of the ratios of
neighbouring runs, and their range.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gradmap_plugins.gradmap_score import gate_importance
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gradmap_pipeline.batches import Batch, make_batches, next_token_losses, predicted_tokens
from gradmap_pipeline.checkpoint.graph import open_folder
from gradmap_pipeline.machine.accelerators import wait_for
from gradmap_pipeline.machine.memory import tune_allocator
from gradmap_pipeline.sweep.layerwise import LayerwiseModel
from gradmap_pipeline.sweep.sample_pass import SamplePass


def make_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def run_plain(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    predicted = sum(int(predicted_tokens(batch).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        embedded = model.get_input_embeddings()(batch.input_ids.to(model.device)).requires_grad_()
        loss = next_token_losses(model(inputs_embeds=embedded, use_cache=False).logits, batch).sum() / predicted
        loss.backward()
        assert embedded.grad is not None
        total += loss.item()
    return total


def run_sweep(model: LayerwiseModel, batches: list[Batch], keep_graphs: bool) -> float:
    sweep = SamplePass(model, batches, keep_graphs=keep_graphs)
    return math.fsum(
        gate_importance(visit.gradient, visit.output - visit.input, visit.mask) for step in sweep.backward() for visit in step
    )


def measure(action: Callable[[], float], device: str) -> float:
    wait_for(device)
    started = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tune_allocator(is_tight=False)  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, arguments.dtype)).eval().to(arguments.device)
        for parameter in plain.parameters():
            parameter.requires_grad_(False)
        model = LayerwiseModel(open_folder(Path(folder)), dtype=arguments.dtype, device=arguments.device)
        shape = arguments.samples, arguments.length
        ids = torch.randint(0, 8192, shape, generator=torch.Generator().manual_seed(0))
        batches = make_batches(ids, torch.ones(shape), arguments.batch_tokens)
        ways: dict[str, Callable[[], float]] = {
            "plain": lambda: run_plain(plain, batches),
            "graphs kept": lambda: run_sweep(model, batches, keep_graphs=True),
            "recomputed": lambda: run_sweep(model, batches, keep_graphs=False),
        }
        for action in ways.values():
            action()
        seconds = [{name: measure(action, arguments.device) for name, action in ways.items()} for _ in range(arguments.rounds)]
    print(f"{sum(p.numel() for p in plain.parameters()) / 1e6:.1f} M parameters, {shape[0]} x {shape[1]} tokens, ", end="")
    print(f"{arguments.dtype}, {arguments.threads} threads, {arguments.rounds} rounds")
    print(f"{'':12} {'seconds':>8} {'ratio':>6}  range")
    for name in ways:
        ratios = sorted(row[name] / row["plain"] for row in seconds)
        middle = statistics.median(row[name] for row in seconds)
        print(f"{name:12} {middle:8.2f} {statistics.median(ratios):6.3f}  {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
