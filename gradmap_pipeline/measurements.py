"""Artifacts that say how good a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from .artifacts import Artifact, NameOf, name_in
from .metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import BaseModel
    from typing_extensions import Self


class Measurement(Artifact):
    """Metrics of a model: what a stage that measures may give."""

    model: str
    """Digest of the model."""
    metrics: tuple[Metric, ...]

    def list_metrics(self) -> Sequence[Metric]:
        return self.metrics

    def with_names_of(self, options: BaseModel) -> Self:
        metrics = []
        for metric in self.metrics:
            name = name_in(options, metric.on_option)
            metrics.append(metric if name is None else metric.model_copy(update={"on": name}))
        return super().with_names_of(options).model_copy(update={"metrics": tuple(metrics)})


class Evaluation(Artifact):
    """How well a model predicts a text."""

    model: str
    """Digest of the model."""
    label: str
    """What was done to the model last: dense, pruned, compensated."""
    dataset: Annotated[str, NameOf("dataset")]
    perplexity: float
    loss: float
    """Mean next-token cross-entropy in nats."""
    samples: int
    sequence_length: int
    tokens: int
    """Tokens predicted."""
    layers: int
    parameters: int
    bytes: int
    packing: str = "documents"
    """How texts became sequences: `documents`, end to end; `none`, one text a sequence."""
    base_perplexity: float | None = None
    """Perplexity of the unpruned model on the same text, where a limit requires it."""

    def list_metrics(self) -> Sequence[Metric]:
        setting = f"{self.samples} x {self.sequence_length} tokens"
        if self.packing != "documents":
            setting += f", packing {self.packing}"
        return [Metric(name="perplexity", value=self.perplexity, better="lower", on=self.dataset, setting=setting)]
