"""Token ids that a model draws itself, one after another.

Sizes: B sequences at a time, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..checkpoint import adapter
from ..checkpoint.checkpoint import item_bytes
from ..errors import CapacityError, StageError
from ..machine.memory import give_back, resident_bytes
from ..machine.memory_advice import lack_of_memory
from ..sweep.memory_plan import format_size
from .sequences import draw_rows
from .tokenizer import count_embeddings, first_token, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..checkpoint.graph import ModelGraph
    from ..context import Advance, Context
    from .calibration_sources import GeneratedText

GENERATED_TOGETHER = 32
"""Sequences that are drawn, and kept for later runs, together."""
_SEED_STRIDE = 1_000_003  # keeps the seeds of the sequences of one run apart from those of the next


def generate_rows(
    text: GeneratedText, graph: ModelGraph, length: int, samples: int, seed: int, context: Context
) -> list[array[int]]:
    """`samples` sequences of `length` token ids, drawn from the model; its own choice after EOS too, as in packed text.

    Every sequence has its own random numbers, by the seed and its number. Each 32 are kept for later runs when they are done.
    Raises `CapacityError` where the model, and the keys and values of one sequence, do not fit into the memory of the step.
    """
    tokenizer, embeddings = load_tokenizer(graph.base), count_embeddings(graph.base)
    if text.prompts is None:
        starts = [array("i", [first_token(tokenizer)])] * samples
    else:
        starts = draw_rows(
            tokenizer, text.prompts.documents(seed), min(text.prompt_tokens, length - 1), samples, "documents", seed, embeddings
        )
    writer = _Writer(text, graph, length, min(embeddings, len(tokenizer)), context)
    content = graph.model_copy(update={"label": ""}).content()
    rows: list[array[int]] = []
    with context.progress("generate text", samples * length, "token") as advance:
        for start in range(0, samples, GENERATED_TOGETHER):
            numbers = range(start, min(start + GENERATED_TOGETHER, samples))
            some = [starts[number].tolist() for number in numbers]
            seeds = [(seed * _SEED_STRIDE + number) % 2**63 for number in numbers]
            key = {
                "model": content,
                "starts": some,
                "seeds": seeds,
                "length": length,
                "temperature": text.temperature,
                "top_k": text.top_k,
                "words": writer.words,
            }
            kept: list[list[int]] = context.remember(key, partial(writer.write, some, seeds, advance))
            rows += [array("i", ids) for ids in kept]
    writer.close()
    return rows


class _Writer:
    """A model in memory that goes on with sequences; read when it is first needed."""

    def __init__(self, text: GeneratedText, graph: ModelGraph, length: int, words: int, context: Context) -> None:
        self.text, self.graph, self.length, self.context = text, graph, length, context
        self.words = words
        """Ids that may be drawn: those of tokens."""

    @cached_property
    def _model(self) -> PreTrainedModel:
        from ..checkpoint.rope import forget_lengths
        from ..checkpoint.whole import load_whole

        model = load_whole(self.graph, self.context.dtype, self.context.device)
        model.eval()
        forget_lengths(model)
        return model

    @cached_property
    def _together(self) -> int:
        """Sequences at a time, by the memory that there is. Fewer change no random number."""
        model, each = count_generation_bytes(self.graph, self.length, self.context.dtype)
        free = self.context.memory - resident_bytes(self.context.device)
        if model + each > free:
            give_back()
            free = self.context.memory - resident_bytes(self.context.device)
        if model + each > free:
            raise lack_of_memory_for_text(model, each, self.length, self.context.memory, free, self.context.dtype)
        return min(GENERATED_TOGETHER, (free - model) // each)

    def write(self, starts: list[list[int]], seeds: list[int], advance: Advance) -> list[list[int]]:
        """Go on with sequences of one length, B of them, to the full length."""
        together = self._together
        rows: list[list[int]] = []
        for at in range(0, len(starts), together):
            rows += self._write_some(starts[at : at + together], seeds[at : at + together], advance)
        return rows

    def _write_some(self, starts: list[list[int]], seeds: list[int], advance: Advance) -> list[list[int]]:
        import torch

        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rows = [list(start) for start in starts]
        advance(sum(map(len, rows)))
        step, cache = torch.tensor(rows, device=self.context.device), None
        with torch.no_grad():
            while len(rows[0]) < self.length:
                logits, cache = adapter.call_with_cache(self._model, step, cache)
                drawn = self._draw(logits[:, -1, : self.words].float().cpu(), generators)
                for row, token in zip(rows, drawn, strict=True):
                    row.append(token)
                step = torch.tensor([[token] for token in drawn], device=self.context.device)
                advance(len(rows))
        return rows

    def _draw(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """One token for each sequence from its logits (B, V), float32."""
        import torch

        if not logits.isfinite().all():
            raise StageError(f"the logits of the model are not finite in {self.context.dtype}; compute in another --dtype")
        ids: torch.Tensor | None = None
        if self.text.top_k is not None and self.text.top_k < logits.shape[1]:
            logits, ids = logits.topk(self.text.top_k)
        shares = (logits / self.text.temperature).softmax(-1)
        places = [int(torch.multinomial(row, 1, generator=generator)) for row, generator in zip(shares, generators, strict=True)]
        return places if ids is None else [int(ids[number, place]) for number, place in enumerate(places)]

    def close(self) -> None:
        """Give back the memory of the model."""
        if "_model" in vars(self):
            del self._model
            give_back()


def count_generation_bytes(graph: ModelGraph, length: int, dtype: str) -> tuple[int, int]:
    """Bytes of the whole model, and of what one sequence adds: keys and values, and the logits of a token in a few copies."""
    from ..checkpoint.source import load_config, text_config

    item = item_bytes(dtype)
    config: dict[str, Any] = text_config(load_config(graph.base.folder))
    skeleton = {name: config.get(name) for name in ("num_attention_heads", "n_head", "hidden_size", "n_embd", "d_model")}
    heads = skeleton["num_attention_heads"] or skeleton["n_head"] or 1
    hidden = skeleton["hidden_size"] or skeleton["n_embd"] or skeleton["d_model"] or graph.map_sizes()[1]
    whole = config.get("qk_nope_head_dim") or 0
    size = max(config.get("head_dim") or 0, whole + (config.get("qk_rope_head_dim") or 0), -(-hidden // heads))
    width = size * (config.get("num_key_value_heads") or heads)
    cached = 2 * len(graph.layers) * length * width * item
    words = max(tensor.shape[0] for tensor in graph.other_tensors().values() if tensor.shape)
    return graph.count_parameters() * item, cached + cached // 4 + 16 * words


def lack_of_memory_for_text(model: int, each: int, length: int, allowed: int, free: int, dtype: str) -> CapacityError:
    """The error that says why text cannot be generated in the `free` bytes that are left of those allowed."""
    whole, sample = format_size(model), format_size(each)
    return lack_of_memory(
        f"generating text takes the whole model in memory, {whole} in {dtype}, and {sample} for a sequence of {length} tokens; "
        f"{format_size(max(0, free))} are left",
        allowed - free + model + each,
        ["lower 'sequence_length'", "leave 'self' out"],
        dtype=dtype,
    )
