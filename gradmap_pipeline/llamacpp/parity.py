"""Whether a GGUF file computes in llama.cpp what the model does: prompts beyond any window, then cached steps."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StageError
from ..partial import scratch_folder
from ..processes import explain_end, tie

if TYPE_CHECKING:
    import torch

    from ..model.graph import ModelGraph

STEPS = 8
LENGTHS = (12, 100, 500)
_BEYOND = 40
"""Tokens that the longest prompt goes on after a window has ended."""
_LONGEST = 2048
TOLERANCE = {"f32": 1e-3, "f16": 3e-2, "bf16": 1e-1, "q8_0": 3e-1}
"""Of the largest absolute difference of logits, in parts of the largest logit where that is over 1."""

_SCRIPT = Path(__file__).with_name("run_gguf.py")


@dataclass(frozen=True)
class Parity:
    """What running a file beside its model gave."""

    lengths: tuple[int, ...]
    """Of the prompts, in tokens."""
    difference: float
    """Largest absolute difference of logits."""
    log_probability_difference: float
    """Largest absolute difference of the log-probability of the token that the model finds likeliest, in nats."""
    agreeing: float
    """Share of positions at which both find the same token likeliest."""


def choose_lengths(window: int | None, positions: int | None) -> tuple[int, ...]:
    """Lengths of the prompts for a model with this window and this many positions, in tokens."""
    beyond = (window + _BEYOND,) if window and window + _BEYOND > LENGTHS[-1] and window + _BEYOND <= _LONGEST else ()
    bounded = {min(length, positions or length) for length in (*LENGTHS, *beyond)}
    return tuple(sorted(length for length in bounded if length > STEPS))


def measure_parity(graph: ModelGraph, file: Path, weights: str, python: str, seed: int) -> Parity:
    """Run the file and the model on random tokens. Raises `StageError` where logits differ by more than its type explains."""
    import torch

    from ..model.architecture import full_config
    from ..model.batches import Batch
    from ..model.layerwise import LayerwiseModel
    from ..model.sweep import Sweep

    config = full_config(graph.base.folder)
    lengths = choose_lengths(config.get("sliding_window"), config.get("max_position_embeddings"))
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(int(config["vocab_size"]), (1, length), generator=generator) for length in lengths]
    layerwise = LayerwiseModel(graph, dtype="float32", resident_bytes=0)
    batches = [Batch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in prompts]
    meant = [logits[0].float() for logits in Sweep(layerwise, batches, keep_boundaries=False).logits(last=STEPS + 1)]
    found = run_file(file, [ids[0].tolist() for ids in prompts], python)
    return _compare(torch.stack(meant), found.view(len(prompts), STEPS + 1, -1), lengths, weights)


def run_file(file: Path, prompts: Sequence[Sequence[int]], python: str) -> torch.Tensor:
    """Logits (prompts by 9, V), float32, of the last nine positions of each prompt, in a process of its own."""
    import numpy as np
    import torch

    with scratch_folder() as scratch:
        asked, answer = scratch / "prompts.json", scratch / "logits.npy"
        asked.write_text(json.dumps([list(prompt) for prompt in prompts]), encoding="utf-8")
        command = [python, str(_SCRIPT), str(file), str(asked), str(answer), str(torch.get_num_threads()), str(STEPS)]
        done = subprocess.run(tie(command), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise explain_end("llama.cpp", done.returncode, done.stderr or "it said nothing")
        return torch.from_numpy(np.load(answer))


def _compare(meant: torch.Tensor, found: torch.Tensor, lengths: tuple[int, ...], weights: str) -> Parity:
    """Both: logits (prompts, positions, V); llama.cpp may know fewer tokens than the model has embeddings, never more."""
    if found.shape[-1] > meant.shape[-1]:
        raise StageError(f"llama.cpp knows {found.shape[-1]} tokens, the model {meant.shape[-1]}; nothing was written")
    meant = meant[..., : found.shape[-1]]
    differences = (meant - found).abs().amax(dim=(1, 2))
    accepted = TOLERANCE[weights] * max(1.0, float(meant.abs().max()))
    for length, difference in zip(lengths, differences.tolist(), strict=True):
        if not difference <= accepted:
            raise StageError(
                f"the GGUF file does not compute in llama.cpp what the model does: with a prompt of {length} tokens, logits differ "
                f"by {difference:.3g} (accepted: {accepted:.3g}); nothing was written"
            )
    best = meant.argmax(dim=-1, keepdim=True)
    likeliest = [logits.log_softmax(dim=-1).gather(-1, best) for logits in (meant, found)]
    return Parity(
        lengths=lengths,
        difference=float(differences.max()),
        log_probability_difference=float((likeliest[0] - likeliest[1]).abs().max()),
        agreeing=float((found.argmax(dim=-1, keepdim=True) == best).double().mean()),
    )
