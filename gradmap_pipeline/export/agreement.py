"""How far a quantised model is from the one it was made from, on a text: perplexities, and how often both choose the same token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..artifacts import Artifact, NameOf
from ..batches import Batch, make_batches, next_token_losses, predicted_tokens
from ..checkpoint.forecast import ModelForecast
from ..errors import StageError
from ..metrics import Metric
from ..stages.perplexity import perplexity_of
from ..text import name_without_place

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from ..checkpoint.graph import BaseCheckpoint
    from ..data import DatasetSource

Run = Callable[[Batch], "torch.Tensor"]
"""Logits (B, T, V) of a batch."""
_LOGITS_AT_ONCE = 2**25
_LONGEST_DEFAULT = 256


@dataclass(frozen=True)
class Agreement:
    """How two models do on one text."""

    base_loss: float
    """Mean next-token loss of the first, in nats."""
    loss: float
    """Mean next-token loss of the second, in nats."""
    agreement: float
    """Share of tokens, each after those before it, for which both have the same most likely next token."""
    difference: float
    """Largest absolute difference of logits."""
    tokens: int
    """Tokens that were predicted."""

    @property
    def ratio(self) -> float:
        """Perplexity of the second, relative to that of the first; both are no larger than a number can be."""
        return math.exp(self.loss - self.base_loss)

    def find_missed(self, text: str, max_perplexity_ratio: float | None, min_agreement: float | None) -> list[str]:
        """The limits that are not kept, a line each."""
        missed = []
        if max_perplexity_ratio is not None and not self.ratio <= max_perplexity_ratio:
            missed.append(
                f"perplexity on {text!r} is {self.ratio:.4f} times that before quantisation, over max_perplexity_ratio "
                f"{max_perplexity_ratio:g}"
            )
        if min_agreement is not None and not self.agreement >= min_agreement:
            missed.append(
                f"both choose the same next token for {self.agreement:.4f} of the tokens of {text!r}, under min_agreement "
                f"{min_agreement:g}"
            )
        return missed


class TextAgreement(Artifact):
    """What quantisation costs on a text; its metrics are `agreement` and `perplexity_ratio`, where it says of which model."""

    perplexity: float
    """Perplexity of the quantised model on the text."""
    base_perplexity: float
    """Perplexity of what it was made from."""
    agreement: float
    """Share of tokens, each after those before it, for which both have the same most likely next token."""
    tokens: int
    """Tokens of the text that were predicted."""
    text: Annotated[str, NameOf("dataset")]
    model: str | None = None
    """Digest of the quantised model."""

    @classmethod
    def of(cls, measured: Agreement, text: str, **more: Any) -> Self:
        """Raises `StageError` where a perplexity is over the largest number. `more`: `model`, and what a derived class adds."""
        perplexity, base_perplexity = (perplexity_of(loss, text) for loss in (measured.loss, measured.base_loss))
        made = {"perplexity": perplexity, "base_perplexity": base_perplexity, "agreement": measured.agreement}
        return cls(**made, tokens=measured.tokens, text=text, **more)

    def list_metrics(self) -> Sequence[Metric]:
        if self.model is None:
            return ()
        place = {"on": self.text, "setting": f"{self.tokens:,} tokens"}
        return (
            Metric(name="agreement", value=self.agreement, better="higher", **place),
            Metric(name="perplexity_ratio", value=self.perplexity / self.base_perplexity, better="lower", **place),
        )

    def __str__(self) -> str:
        return (
            f"on {self.tokens:,} tokens of {name_without_place(self.text)}: perplexity {self.perplexity:.4g} instead of "
            f"{self.base_perplexity:.4g} ({self.perplexity / self.base_perplexity:.3f} times), "
            f"the same next token for {self.agreement:.1%}"
        )


def check_text(dataset: DatasetSource, samples: int, sequence_length: int | None, model: ModelForecast | None) -> None:
    """Raise `OptionError` where sequences are longer than the model is made for, or more than the text can give."""
    from ..data import check_length

    length = check_length(sequence_length, model)
    if sequence_length is None and length is not None:
        length = min(length, _LONGEST_DEFAULT)
    dataset.check_amount(samples, length, "documents")


def read_text(base: BaseCheckpoint, dataset: DatasetSource, samples: int, sequence_length: int | None) -> list[Batch]:
    """Sequences of a text in batches whose logits fit into memory twice; by default of at most 256 tokens."""
    from ..data import count_embeddings, load_tokenizer, make_sequences

    length = sequence_length or min(base.default_sequence_length, _LONGEST_DEFAULT)
    embeddings = count_embeddings(base)
    ids, mask = make_sequences(load_tokenizer(base), dataset.documents(), length, samples, embeddings=embeddings)
    return cut_batches(ids, mask, embeddings)


def compare_models(base: Run, other: Run, batches: list[Batch], advance: Callable[[], None] = lambda: None) -> Agreement:
    """Run both on the same batches. Raises `StageError` where the second computes a number that is not finite."""
    losses = [0.0, 0.0]
    same = tokens = 0
    difference = 0.0
    for batch in batches:
        logits = [run(batch).float() for run in (base, other)]
        if not bool(logits[1][batch.mask].isfinite().all()):
            raise StageError("what was quantised computes values that are not finite; nothing was written")
        counted = predicted_tokens(batch)
        for index, output in enumerate(logits):
            losses[index] += float(next_token_losses(output, batch).double().sum())
        chosen = [output[:, :-1].argmax(-1) for output in logits]
        same += int((chosen[0] == chosen[1])[counted].sum())
        tokens += int(counted.sum())
        difference = max(difference, float((logits[0] - logits[1])[batch.mask].abs().max()))
        advance()
    if not tokens:
        raise StageError("no token is predicted: each text is one token long; use longer texts")
    return Agreement(losses[0] / tokens, losses[1] / tokens, same / tokens, difference, tokens)


def cut_batches(ids: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> list[Batch]:
    """Samples (S, T) in batches whose logits fit into memory twice."""
    return make_batches(ids, mask, max(1, _LOGITS_AT_ONCE // vocabulary))
