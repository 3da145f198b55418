"""Whether a GGUF file computes in llama.cpp what the model does: prompts beyond any window, then cached steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from .limits import name_ignored_window, rounds_yarn
from .session import GgufSession

if TYPE_CHECKING:
    import torch

    from ...checkpoint.graph import ModelGraph

STEPS = 8
LENGTHS = (12, 100, 500)
_BEYOND = 40
"""Tokens that the longest prompt goes on after a window has ended."""
_LONGEST = 2048
TOLERANCE = {"f32": 5e-3, "f16": 3e-2, "bf16": 1e-1, "q8_0": 3e-1}
"""Limits of the largest absolute difference of logits, in parts of the largest logit where that is over 1.

In float32 too llama.cpp looks GELU up in a table of float16.
"""
YARN_TOLERANCE = 1e-1
"""The least limit where llama.cpp rounds what the model does not."""


@dataclass(frozen=True)
class Parity:
    """What running a file beside its model, or beside another file, gave. Positions: the last nine of each prompt."""

    lengths: tuple[int, ...]
    """Lengths of the prompts, in tokens."""
    difference: float
    """Largest absolute difference of logits."""
    log_probability_difference: float
    """Largest absolute difference of the log-probability of the token that the model finds likeliest, in nats."""
    agreeing: float
    """Share of positions at which both find the same token likeliest."""
    lost: float
    """Most that the log-probability in the model loses, in nats, where the likeliest token of the file is taken."""

    def as_json(self) -> dict[str, Any]:
        """For the lineage of an export."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"run by llama.cpp at {', '.join(map(str, self.lengths))} tokens of random prompts, logits differ by up to "
            f"{self.difference:.2g}, {self.agreeing:.0%} of likeliest tokens agree"
        )


def choose_lengths(window: int | None, positions: int | None, ignored: int | None = None) -> tuple[int, ...]:
    """Lengths of the prompts for a model with this window and this many positions, in tokens.

    `ignored`: a window that llama.cpp leaves out; no prompt is longer.
    """
    beyond = (window + _BEYOND,) if window and LENGTHS[-1] < window + _BEYOND <= _LONGEST else ()
    bounds = [bound for bound in (positions, ignored) if bound]
    bounded = {min(length, *bounds) if bounds else length for length in (*LENGTHS, *beyond)}
    return tuple(sorted(length for length in bounded if length > STEPS))


def make_prompts(graph: ModelGraph, words: int, seed: int) -> list[list[int]]:
    """Random token ids. `words`: tokens that the file knows; the model may have embeddings for more, or for fewer."""
    import torch

    from ...checkpoint.architecture import full_config

    config = full_config(graph.base.folder)
    positions, ignored = config.get("max_position_embeddings"), name_ignored_window(config)
    lengths = choose_lengths(config.get("sliding_window"), positions, ignored)
    if not lengths:
        raise StageError(_explain_too_short(positions, ignored))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(min(words, int(config["vocab_size"])), (n,), generator=generator).tolist() for n in lengths]


def _explain_too_short(positions: int | None, ignored: int | None) -> str:
    needed = f"{STEPS + 1} tokens are needed to run it"
    if ignored is not None and ignored <= STEPS:
        return f"llama.cpp computes another model beyond the window of {ignored} tokens, and {needed}"
    return f"the model has {positions} positions, and {needed}"


def measure_parity(graph: ModelGraph, file: Path, weights: str, python: str, seed: int) -> Parity:
    """Run the file and the model on random tokens. Raises `StageError` where logits differ by more than its type explains."""
    from ...checkpoint.architecture import full_config

    with GgufSession(file, python) as session:
        prompts = make_prompts(graph, session.words, seed)
        computed = session.run(prompts, STEPS)
    lengths = tuple(map(len, prompts))
    tolerance = max(TOLERANCE[weights], YARN_TOLERANCE if rounds_yarn(full_config(graph.base.folder)) else 0.0)
    return compare_logits(compute_logits(graph, prompts), computed, lengths, tolerance)


def compare_files(graph: ModelGraph, plain: Path, file: Path, python: str, seed: int) -> Parity:
    """Run a quantised file beside the one it was made from."""
    with GgufSession(plain, python) as session:
        prompts = make_prompts(graph, session.words, seed)
        meant = session.run(prompts, STEPS)
    with GgufSession(file, python) as session:
        computed = session.run(prompts, STEPS)
    return compare_logits(meant, computed, tuple(map(len, prompts)))


def compute_logits(graph: ModelGraph, prompts: list[list[int]]) -> torch.Tensor:
    """Logits (prompts, 9, V) of the model itself, in float32."""
    import torch

    from ...batches import Batch
    from ...sweep.layerwise import LayerwiseModel
    from ...sweep.sample_pass import SamplePass

    layerwise = LayerwiseModel(graph, dtype="float32", resident_bytes=0)
    ids = [torch.tensor([prompt]) for prompt in prompts]
    batches = [Batch(row, torch.ones_like(row, dtype=torch.bool)) for row in ids]
    sweep = SamplePass(layerwise, batches, keep_boundaries=False)
    return torch.stack([logits[0].float() for logits in sweep.logits(last=STEPS + 1)])


def compare_logits(meant: torch.Tensor, received: torch.Tensor, lengths: tuple[int, ...], tolerance: float | None = None) -> Parity:
    """Compare logits (prompts, positions, V). Numbers of tokens may differ: those that one side alone knows are left out.

    A file that finds a token likeliest which the model does not have does not agree there. `tolerance`: as in `TOLERANCE`; where
    that is exceeded, `StageError` is raised.
    """
    shared = min(meant.shape[-1], received.shape[-1])
    ours, theirs = meant[..., :shared], received[..., :shared]
    differences = (ours - theirs).abs().amax(dim=(1, 2))
    if tolerance is not None:
        accepted = tolerance * max(1.0, float(ours.abs().max()))
        for length, difference in zip(lengths, differences.tolist(), strict=True):
            if not difference <= accepted:
                raise StageError(
                    f"the GGUF file does not compute in llama.cpp what the model does: with a prompt of {length} tokens, logits "
                    f"differ by {difference:.3g} (accepted: {accepted:.3g}); nothing was written"
                )
    best = ours.argmax(dim=-1, keepdim=True)
    expected, computed = ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
    lost = expected.gather(-1, best) - expected.gather(-1, theirs.argmax(dim=-1, keepdim=True))
    return Parity(
        lengths=lengths,
        difference=float(differences.max()),
        log_probability_difference=float((expected.gather(-1, best) - computed.gather(-1, best)).abs().max()),
        agreeing=float((received.argmax(dim=-1, keepdim=True) == best).double().mean()),
        lost=float(lost.max()),
    )
