"""What a model says to prompts, the likeliest token at each place, and whether it says the same again and again.

Sizes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from ..artifacts import Artifact
from ..batches import Batch
from ..checkpoint import adapter
from ..checkpoint.graph import ModelGraph
from ..checkpoint.source import count_positions, load_config
from ..errors import OptionError, StageError
from ..machine.memory import give_back, resident_bytes
from ..machine.memory_advice import lack_of_memory
from ..metrics import Metric
from ..sweep.memory_plan import format_size
from .documents import Chat
from .generation import count_generation_bytes
from .tokenizer import check_ids, count_embeddings, first_token, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from ..checkpoint.graph import BaseCheckpoint
    from ..checkpoint.model import Model
    from ..context import Context

REPEATED_FROM = 0.5
"""Repetition from which an answer counts as one that repeats itself."""
_GRAM = 4  # tokens
_QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that adds two numbers.",
)
_BEGINNINGS = ("The capital of France is", "The sky is blue because", "def add(a, b):\n    ")


class Answer(BaseModel):
    """What a model says to a prompt, and what the unpruned model says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answer: str
    base_answer: str
    repetition: float
    """Share of the answer's four tokens in a row that stood in it before."""
    base_repetition: float
    agreement: float
    """Share of the answer that the unpruned model gives too, up to the first token that differs."""

    @property
    def repeats(self) -> bool:
        """Whether half of the answer, or more, stood in it before."""
        return self.repetition >= REPEATED_FROM


class Answers(Artifact):
    """Answers of a model to prompts, beside those of the unpruned model."""

    model: str
    """Digest of the model."""
    tokens: int
    """Most tokens of an answer."""
    answers: tuple[Answer, ...]

    def list_metrics(self) -> Sequence[Metric]:
        count = len(self.answers)
        means = [sum(each) / count for each in zip(*((one.repetition, one.agreement) for one in self.answers), strict=True)]
        setting = f"{count} answers of up to {self.tokens} tokens"
        return [
            Metric(name="repetition", value=means[0], better="lower", setting=setting),
            Metric(name="agreement", value=means[1], better="higher", setting=setting),
        ]


class Prompts:
    """Prompts as token ids: through the chat template where the tokenizer has one."""

    def __init__(self, base: BaseCheckpoint, texts: Sequence[str] | None, tokens: int) -> None:
        """`texts`: None takes three that fit the model. `tokens`: of an answer.

        Raises `OptionError` where the model cannot take one of them.
        """
        self.tokenizer = load_tokenizer(base)
        is_chat = bool(getattr(self.tokenizer, "chat_template", None))
        self.texts = tuple(texts) if texts is not None else _QUESTIONS if is_chat else _BEGINNINGS
        try:
            self.rows = [self._encode(text, is_chat) for text in self.texts]
            check_ids(self.rows, self.tokenizer, count_embeddings(base))
        except StageError as error:
            raise OptionError("prompts", str(error)) from error
        self.tokens = tokens
        self.ends = _find_ends(base, self.tokenizer)
        positions = count_positions(load_config(base.folder))
        for text, row in zip(self.texts, self.rows, strict=True):
            if positions is not None and len(row) + tokens > positions:
                raise OptionError(
                    "tokens",
                    f"found {tokens}, and the prompt {text[:40]!r} has {len(row)} tokens; the model is made for {positions} "
                    "together",
                )

    def _encode(self, text: str, is_chat: bool) -> list[int]:
        if is_chat:
            chat = Chat([{"role": "user", "content": text}], f"prompt {text[:40]!r}")
            ids = self.tokenizer(chat.render(self.tokenizer, is_question=True), add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(text)["input_ids"]
        return list(ids) or [first_token(self.tokenizer)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _find_ends(base: BaseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer: of the tokenizer, and of generation_config.json."""
    file = base.folder / "generation_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = config.get("eos_token_id")
    ends = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(end for end in ends if isinstance(end, int))


def answer_prompts(model: Model, prompts: Prompts, context: Context) -> list[list[int]]:
    """The ids that a model says to each prompt: the likeliest token at each place, up to one that ends an answer.

    Answers are kept, so a model that has answered is not asked again. Any model can answer: each token is one call of the
    whole model on all before it. Raises `CapacityError` where the model does not fit into memory.
    """
    content = model.model_copy(update={"label": ""}).content() if isinstance(model, ModelGraph) else model.content()
    key = {"model": content, "prompts": prompts.rows, "tokens": prompts.tokens, "ends": sorted(prompts.ends)}

    def compute() -> list[list[int]]:
        run = _open(model, prompts, context)
        total = len(prompts.rows) * prompts.tokens
        with context.progress(f"answer prompts with the {model.label} model", total, "token") as advance:
            return [_answer(run, row, prompts, advance, context.dtype) for row in prompts.rows]

    answers: list[list[int]] = context.remember(key, compute)
    give_back()
    return answers


def _open(model: Model, prompts: Prompts, context: Context) -> Callable[[Sequence[int]], torch.Tensor]:
    """A function from token ids (T) to the logits (V) of the one that follows."""
    import torch

    if not isinstance(model, ModelGraph):
        compute = model.open(context.device)
        return lambda ids: compute(Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)))[0, -1]
    from ..checkpoint.rope import forget_lengths
    from ..checkpoint.whole import load_whole

    weights, each = count_generation_bytes(model, max(map(len, prompts.rows)) + prompts.tokens, context.dtype)
    free = context.memory - resident_bytes(context.device)
    if weights + each > free:
        raise lack_of_memory(
            f"answering prompts takes the whole model in memory, {format_size(weights + each)} in {context.dtype}; "
            f"{format_size(max(0, free))} are left",
            context.memory - free + weights + each,
            ["leave the step out"],
            dtype=context.dtype,
        )
    module = load_whole(model, context.dtype, context.device).eval()
    forget_lengths(module)
    keeps = adapter.can_keep_positions(module)

    def run(ids: Sequence[int]) -> torch.Tensor:
        row = torch.tensor([ids], device=context.device)
        last = torch.tensor([len(ids) - 1], device=context.device) if keeps else None
        with torch.no_grad():
            logits: torch.Tensor = adapter.call_without_cache(module, row, None, last).logits
        return logits[0, -1]

    return run


def _answer(
    run: Callable[[Sequence[int]], torch.Tensor], prompt: Sequence[int], prompts: Prompts, advance: Callable[[], None], dtype: str
) -> list[int]:
    """The ids that follow a prompt."""
    ids, words = list(prompt), len(prompts.tokenizer)
    while len(ids) < len(prompt) + prompts.tokens:
        logits = run(ids)[:words].float()
        if not logits.isfinite().all():
            raise StageError(f"the logits of the model are not finite in {dtype}; compute in another --dtype")
        token = int(logits.argmax())
        advance()
        if token in prompts.ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


def agreeing_share(ids: Sequence[int], others: Sequence[int]) -> float:
    """Share of the longer of two answers, as token ids, before the first place where they differ; 1 where both are empty."""
    longer = max(len(ids), len(others))
    pairs = enumerate(zip(ids, others, strict=False))
    alike = next((place for place, (one, other) in pairs if one != other), min(len(ids), len(others)))
    return alike / longer if longer else 1.0


def repetition(ids: Sequence[int]) -> float:
    """Share of the four tokens in a row that stood in the text before, in [0, 1]; 0 for a text of fewer than five tokens.

    Source: seq-rep-4 of https://arxiv.org/abs/1908.04319, section 6.1.
    """
    grams = [tuple(ids[at : at + _GRAM]) for at in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
