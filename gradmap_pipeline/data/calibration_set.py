"""The token ids that stages compute on, and what a plan knows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, PlainSerializer

from ..artifacts import Artifact, NameOf, TensorFile, only_for_people

if TYPE_CHECKING:
    import torch


class CalibrationForecast(BaseModel):
    """What a plan knows of a calibration set before anything runs. None: not known yet."""

    samples: int | None = None
    sequence_length: int | None = None


class CalibrationPart(BaseModel):
    """What one part of a mix gave to a calibration set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    tokens: int
    """Tokens that are not padding."""
    sha256: str
    """Of its samples, as `digest_sequences` makes it."""


class CalibrationSet(Artifact):
    """Token ids on which layers are scored and corrections are fitted."""

    Forecast = CalibrationForecast

    tensors: TensorFile
    """`input_ids` int32 (samples, length); `attention_mask` uint8 (samples, length), 0 where padded."""
    samples: int
    sequence_length: int
    tokens: int
    """Tokens that are not padding."""
    tokenizer: str
    """Digest of the tokenizer that made the ids."""
    source: Annotated[str, NameOf("dataset"), PlainSerializer(only_for_people)]
    """The text they come from, for people: no part of the content."""
    parts: tuple[CalibrationPart, ...] = ()
    """Of a mix, its parts in the order of the recipe; `source` names them. Their samples stand in turn."""

    def load(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids int64 and attention_mask int64, both (samples, length)."""
        tensors = self.tensors.load()
        return tensors["input_ids"].long(), tensors["attention_mask"].long()
