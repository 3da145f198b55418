"""Text to calibrate on: one data set, text that the model writes itself, or a mix of these by weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import OptionError
from .sequences import Packing
from .sources import DatasetSource
from .tokenizer import first_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GeneratedText(BaseModel):
    """Text that the model writes itself, token by token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, gt=0, description="Logits are divided by it; below 1, likely tokens become likelier.")
    top_k: int | None = Field(50, ge=1, description="Draw from so many of the likeliest tokens; null: from all.")
    prompts: DatasetSource | None = Field(
        None, description="Text whose sequences the model goes on with. Default: it starts from the BOS token, else from EOS."
    )
    prompt_tokens: int = Field(16, ge=1, description="Tokens of a prompt; they are part of the sample.")

    @model_validator(mode="after")
    def _check_prompts(self) -> GeneratedText:
        if self.prompts is None and "prompt_tokens" in self.model_fields_set:
            raise ValueError("'prompt_tokens' counts the tokens of 'prompts', which is missing")
        return self

    def check_amount(self, samples: int, length: int | None) -> None:
        """Raise `OptionError` where prompts leave nothing to generate, or are fewer than samples."""
        if self.prompts is None:
            return
        if length is not None and self.prompt_tokens >= length:
            raise OptionError(
                "dataset", f"'prompt_tokens' is {self.prompt_tokens}, and a sample has {length}; leave some for the model to write"
            )
        self.prompts.check_amount(samples, self.prompt_tokens, "documents")


class _OneSource(DatasetSource):
    """A data set, or text that the model writes."""

    model_config = ConfigDict(populate_by_name=True)

    places: ClassVar[dict[str, str]] = {**DatasetSource.places, "self": "generated"}

    generated: GeneratedText | None = Field(
        None, alias="self", description="Text that the model writes itself: {} for the defaults, or how it is drawn."
    )

    @property
    def name(self) -> str:
        return super().name if self.generated is None else "text of the model itself"

    def check_amount(self, samples: int, length: int | None, packing: str) -> None:
        if self.generated is None:
            super().check_amount(samples, length, packing)
        else:
            self.generated.check_amount(samples, length)

    def check_fits_tokenizer(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        if self.generated is None:
            super().check_fits_tokenizer(load_tokenizer)
        elif self.generated.prompts is not None:
            self.generated.prompts.check_fits_tokenizer(load_tokenizer)
        else:
            first_token(load_tokenizer())

    def check_gives(
        self,
        samples: int,
        length: int,
        packing: Packing,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        is_shuffled: bool = False,
    ) -> None:
        if self.generated is None:
            super().check_gives(samples, length, packing, load_tokenizer, is_shuffled=is_shuffled)
        elif self.generated.prompts is not None:
            tokens = self.generated.prompt_tokens
            self.generated.prompts.check_gives(samples, tokens, "documents", load_tokenizer, is_shuffled=True)

    def local_paths(self) -> list[Path]:
        prompts = None if self.generated is None else self.generated.prompts
        return super().local_paths() if prompts is None else prompts.local_paths()

    def fingerprint(self, digest_of: Callable[[Path], str]) -> Any:
        if self.generated is None:
            return super().fingerprint(digest_of)
        prompts = self.generated.prompts
        drawn = self.generated.model_dump(mode="json", exclude={"prompts"})
        return {"self": {**drawn, "prompts": None if prompts is None else prompts.fingerprint(digest_of)}}


class MixPart(_OneSource):
    """One part of a mix: a source, and its weight."""

    weight: float = Field(1.0, gt=0, description="Share of the samples, relative to the weights of the other parts.")


class CalibrationSource(_OneSource):
    """Text to calibrate on: exactly one of `path`, `id`, `builtin`, `self` and `mix`."""

    places: ClassVar[dict[str, str]] = {**_OneSource.places, "mix": "mix"}

    mix: tuple[MixPart, ...] | None = Field(
        None,
        description="Several sources, each written as one is here, with a `weight` (default 1): its share of the samples, relative "
        "to the weights of the others; of packed samples, and so of tokens.",
    )

    @model_validator(mode="after")
    def _check_mix(self) -> CalibrationSource:
        if self.mix is not None and len(self.mix) < 2:
            raise ValueError(f"'mix' needs at least two parts; found {len(self.mix)}")
        return self

    @property
    def name(self) -> str:
        if self.mix is None:
            return super().name
        total = sum(part.weight for part in self.mix)
        return "mix of " + ", ".join(f"{part.name} ({part.weight / total:.0%})" for part in self.mix)

    def parts(self) -> Sequence[_OneSource]:
        """The sources of a mix; of anything else, itself."""
        return [self] if self.mix is None else self.mix

    def share_out(self, samples: int) -> list[int]:
        """Samples of each part: by weight, and where that is no whole number, one more for the largest remainders.

        Raises `OptionError` where a part gets none.
        """
        if self.mix is None:
            return [samples]
        total = sum(part.weight for part in self.mix)
        exact = [samples * part.weight / total for part in self.mix]
        counts = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda number: counts[number] - exact[number])  # stable: the first of equals
        for number in by_remainder[: samples - sum(counts)]:
            counts[number] += 1
        for number, (part, count) in enumerate(zip(self.mix, counts, strict=True), 1):
            if not count:
                raise OptionError(
                    "dataset",
                    f"part {number} of the mix ({part.name}) gets none of {samples} samples; raise 'samples' or its 'weight', or "
                    "leave it out",
                )
        return counts

    def check_amount(self, samples: int, length: int | None, packing: str) -> None:
        if self.mix is None:
            super().check_amount(samples, length, packing)
            return
        for number, (part, count) in enumerate(zip(self.mix, self.share_out(samples), strict=True), 1):
            with _naming(number):
                part.check_amount(count, length, packing)

    def check_fits_tokenizer(self, load_tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
        if self.mix is None:
            super().check_fits_tokenizer(load_tokenizer)
            return
        for number, part in enumerate(self.mix, 1):
            with _naming(number):
                part.check_fits_tokenizer(load_tokenizer)

    def check_gives(
        self,
        samples: int,
        length: int,
        packing: Packing,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        is_shuffled: bool = False,
    ) -> None:
        if self.mix is None:
            super().check_gives(samples, length, packing, load_tokenizer, is_shuffled=is_shuffled)
            return
        for number, (part, count) in enumerate(zip(self.mix, self.share_out(samples), strict=True), 1):
            with _naming(number):
                part.check_gives(count, length, packing, load_tokenizer, is_shuffled=is_shuffled)

    def local_paths(self) -> list[Path]:
        return super().local_paths() if self.mix is None else [path for part in self.mix for path in part.local_paths()]

    def fingerprint(self, digest_of: Callable[[Path], str]) -> Any:
        if self.mix is None:
            return super().fingerprint(digest_of)
        return {"mix": [{"weight": part.weight, "text": part.fingerprint(digest_of)} for part in self.mix]}


@contextmanager
def _naming(part: int) -> Iterator[None]:
    """Refusals say which part of the mix they are of."""
    try:
        yield
    except OptionError as error:
        raise OptionError(error.option, f"part {part} of the mix: {error}") from None
