"""Greedy decoding with a cache, timed: in transformers, in ONNX Runtime and in llama.cpp.

Sizes: B sequences, T tokens of a prompt, N tokens that are decoded one after another, V vocabulary.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..checkpoint import adapter
from ..checkpoint.graph import ModelGraph
from ..errors import StageError
from ..machine.accelerators import wait_for
from ..machine.memory import give_back
from .exports import GgufFolder, OnnxFolder, TransformersFolder, load_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .llamacpp.session import GgufSession
    from .ort.session import OnnxSession

Decodable = ModelGraph | TransformersFolder | OnnxFolder | GgufFolder
"""Models that can be decoded with a cache."""


@dataclass(frozen=True)
class Decoding:
    """One pass over prompts (B, T), and N passes over one further token of each."""

    prefill: float
    """Seconds of the pass over the prompts, until the first token is known."""
    decode: float
    """Seconds of the N passes after it."""
    ids: torch.Tensor
    """The tokens chosen, int64 (B, N + 1)."""


class Decoder(Protocol):
    """A model in memory."""

    def decode(self, prompts: torch.Tensor, tokens: int) -> Decoding:
        """Decode N = `tokens` further tokens after prompts (B, T), the likeliest each time; an end of text ends nothing."""


class TorchDecoder:
    """A model of transformers, with its own cache."""

    def __init__(self, module: PreTrainedModel, device: str) -> None:
        from ..checkpoint.rope import forget_lengths

        self._module, self._device = module.eval(), device
        forget_lengths(self._module)

    def decode(self, prompts: torch.Tensor, tokens: int) -> Decoding:
        import torch

        ids = prompts.to(self._device)
        with torch.no_grad():
            wait_for(self._device)
            started = time.perf_counter()
            chosen, cache = self._step(ids, None)
            wait_for(self._device)
            first = time.perf_counter()
            steps = [chosen]
            for _ in range(tokens):
                chosen, cache = self._step(chosen, cache)
                steps.append(chosen)
            wait_for(self._device)
            ended = time.perf_counter()
        return Decoding(first - started, ended - first, torch.cat(steps, 1).cpu())

    def _step(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        logits, cache = adapter.call_with_cache(self._module, ids, cache, last=True)
        return logits[:, -1].argmax(-1, keepdim=True), cache


class OnnxDecoder:
    """A graph in ONNX Runtime on the CPU."""

    def __init__(self, session: OnnxSession) -> None:
        self._session = session

    def decode(self, prompts: torch.Tensor, tokens: int) -> Decoding:
        import torch

        rows, length = prompts.shape
        mask = torch.ones(rows, length + tokens, dtype=torch.long)
        cache = self._session.start(rows)
        started = time.perf_counter()
        logits, cache = self._session.run(prompts, mask[:, :length], cache)
        steps = [logits[:, -1].argmax(-1, keepdim=True)]
        first = time.perf_counter()
        for step in range(1, tokens + 1):
            logits, cache = self._session.run(steps[-1], mask[:, : length + step], cache)
            steps.append(logits[:, -1].argmax(-1, keepdim=True))
        ended = time.perf_counter()
        return Decoding(first - started, ended - first, torch.cat(steps, 1))


class GgufDecoder:
    """A file in llama.cpp on the CPU, in its own process, which keeps the time itself."""

    def __init__(self, session: GgufSession) -> None:
        self._session = session

    def decode(self, prompts: torch.Tensor, tokens: int) -> Decoding:
        import torch

        said = self._session.decode(prompts.tolist(), tokens)
        return Decoding(said["prefill"], said["decode"], torch.tensor(said["ids"]))


@contextmanager
def open_decoder(model: Decodable, dtype: str, device: str) -> Iterator[Decoder]:
    """A model in memory for as long as the block lasts. `dtype`, `device`: where a graph is computed; folders have their own types.

    Raises `StageError` where a program that is needed is not there.
    """
    if isinstance(model, GgufFolder):
        with _open_gguf(model) as session:
            yield GgufDecoder(session)
        return
    if isinstance(model, OnnxFolder):
        from .ort.session import OnnxSession

        yield OnnxDecoder(OnnxSession(model.folder))
    elif isinstance(model, TransformersFolder):
        yield TorchDecoder(load_folder(model.folder).to(device), device)
    else:
        from ..checkpoint.whole import load_whole

        yield TorchDecoder(load_whole(model, dtype, device), device)
    give_back()


def _open_gguf(model: GgufFolder) -> GgufSession:
    from .llamacpp.pythons import DECODER, explain_no_runner, find_runner
    from .llamacpp.session import GgufSession

    python = find_runner([model.python or sys.executable, sys.executable])
    if python is None:
        raise StageError(explain_no_runner(model.python or sys.executable))
    return GgufSession(model.file, python, DECODER)
