"""Whether an ONNX graph computes what the torch model does: prefill and cached steps, padded or not, beyond any window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.adapter import make_cache
from ...checkpoint.pretrained import read_config
from ...errors import StageError
from .session import OnnxSession
from .trace import takes_positions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STEPS = 8
TOLERANCE = {"float32": 1e-4, "float16": 3e-2}
"""Limits of the largest absolute difference of logits, in parts of the largest logit where that is over 1."""


@dataclass(frozen=True)
class Reference:
    """What the torch model computes in one case."""

    name: str
    input_ids: torch.Tensor
    """(B, T)"""
    mask: torch.Tensor
    """(B, T)"""
    logits: list[torch.Tensor]
    """Logits of the prefill (B, T - 8, V), then of each cached step (B, 1, V)."""


def make_references(model: PreTrainedModel, seed: int) -> list[Reference]:
    """Run the torch model, so that it need not be in memory together with the graph."""
    return [Reference(name, ids, mask, _run_torch(model, ids, mask)) for name, ids, mask in _make_cases(model, seed)]


def check_parity(references: list[Reference], session: OnnxSession, dtype: str) -> float:
    """The largest absolute difference of logits. Raises `StageError` where one is over the tolerance, and says where."""
    worst = 0.0
    for reference in references:
        scale = max(1.0, *(float(logits.abs().max()) for logits in reference.logits))
        computed = _run_graph(session, reference.input_ids, reference.mask)
        for step, (ours, theirs) in enumerate(zip(computed, reference.logits, strict=True)):
            real = reference.mask[:, : ours.shape[1]].bool() if step == 0 else slice(None)
            difference = float((ours.float() - theirs.float())[real].abs().max())
            if not difference <= TOLERANCE[dtype] * scale:
                place = "in prefill" if step == 0 else f"at cached step {step}"
                raise StageError(
                    f"the ONNX graph does not compute what the model does: with {reference.name}, {place}, logits differ by "
                    f"{difference:.3g} (accepted: {TOLERANCE[dtype] * scale:.3g}); nothing was written"
                )
            worst = max(worst, difference)
    return worst


def measure_difference(one: OnnxSession, other: OnnxSession, folder: Path, seed: int) -> float:
    """Largest absolute difference of logits between two graphs of one model, in prefill. `folder` holds its config."""
    import torch

    words = int(read_config(folder).get_text_config().vocab_size)
    ids = torch.randint(words, (2, 32), generator=torch.Generator().manual_seed(seed))
    logits = [session.run(ids, torch.ones_like(ids), session.start(2))[0].float() for session in (one, other)]
    if not logits[1].isfinite().all():
        raise StageError("the quantised graph computes values that are not finite; nothing was written")
    return float((logits[0] - logits[1]).abs().max())


def _make_cases(model: PreTrainedModel, seed: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What is tried, token ids (B, T), mask (B, T); the last 8 tokens go through the cache one by one."""
    import torch

    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)

    def make(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randint(int(config.vocab_size), (rows, tokens), generator=generator)
        return ids, torch.ones_like(ids)

    yield "3 sequences", *make(3, 9 + STEPS)
    ids, mask = make(3, 9 + STEPS)
    mask[0, :4], mask[1, :1] = 0, 0
    yield "padding on the left", ids, mask
    yield "1 token to start from", *make(1, 1 + STEPS)
    windows = [getattr(config, field, None) for field in ("sliding_window", "attention_chunk_size", "window_size")]
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    beyond = max((window for window in windows if isinstance(window, int) and window + 2 * STEPS <= longest), default=32)
    yield f"{beyond + 2 * STEPS} tokens", *make(1, min(beyond + 2 * STEPS, longest))


def _run_torch(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    import torch

    cache, computed = make_cache(), []
    with torch.no_grad():
        for start, end in _cuts(ids):
            extra: dict[str, Any] = {}
            if takes_positions(model):
                extra["position_ids"] = (mask[:, :end].cumsum(-1) - 1).clamp(min=0)[:, start:]
            output = model(
                input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **extra
            )
            cache = output.past_key_values
            computed.append(output.logits)
    return computed


def _run_graph(session: OnnxSession, ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    cache, outputs = session.start(len(ids)), []
    for start, end in _cuts(ids):
        logits, cache = session.run(ids[:, start:end], mask[:, :end], cache)
        outputs.append(logits)
    return outputs


def _cuts(ids: torch.Tensor) -> list[tuple[int, int]]:
    tokens = ids.shape[1]
    return [(0, tokens - STEPS), *((end - 1, end) for end in range(tokens - STEPS + 1, tokens + 1))]
