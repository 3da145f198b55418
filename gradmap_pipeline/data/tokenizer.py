"""The tokenizer of a model: loaded, compared, and held against the rows of its embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..checkpoint.graph import LONGEST_DEFAULT_SEQUENCE
from ..errors import OptionError, StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..checkpoint.forecast import ModelForecast
    from ..checkpoint.graph import BaseCheckpoint, ModelGraph
    from .calibration_set import CalibrationSet


def check_length(sequence_length: int | None, model: ModelForecast | None) -> int | None:
    """Tokens in a sequence, as far as the plan knows. Raises `OptionError` where that is longer than the model is made for."""
    positions = model.positions if model else None
    if positions and sequence_length and sequence_length > positions:
        complaint = f"found {sequence_length}, but the model is made for {positions} tokens"
        raise OptionError("sequence_length", f"{complaint}; accepted: 2 to {positions}")
    if sequence_length or model is None or model.layers is None:
        return sequence_length
    return min(positions or LONGEST_DEFAULT_SEQUENCE, LONGEST_DEFAULT_SEQUENCE)


def load_tokenizer(base: BaseCheckpoint) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the weights."""
    from ..checkpoint import pretrained

    tokenizer = pretrained.load_tokenizer(base.folder)
    tokenizer.model_max_length = 10**30  # documents are cut into sequences here, not by the tokenizer
    return tokenizer


def check_tokenizer(calibration: CalibrationSet, model: ModelGraph) -> None:
    """Raise `StageError` where another tokenizer than the model's made the token ids of a calibration set."""
    if calibration.tokenizer != model.base.tokenizer_sha256:
        raise StageError(f"the calibration set was made with another tokenizer than that of {model.base.name!r}; calibrate on it")


def count_embeddings(base: BaseCheckpoint) -> int:
    """Rows of the token embeddings as they lie in the checkpoint, whatever config.json says of the vocabulary."""
    from ..checkpoint.pretrained import read_config
    from ..checkpoint.skeleton import build_skeleton

    skeleton = build_skeleton(read_config(base.folder), base.tensors)
    table: Any = skeleton.get_input_embeddings().weight
    name = next(name for name, parameter in skeleton.named_parameters(remove_duplicate=False) if parameter is table)
    ending = ".".join(name.split(".")[-2:])  # prefixes differ between the module and the disk
    stored = [tensor for at, tensor in base.tensors.items() if at == ending or at.endswith(f".{ending}")]
    return int(stored[0].shape[0] if len(stored) == 1 else table.shape[0])


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that texts start from: BOS, else EOS. Raises `OptionError` where the tokenizer has neither."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(token, int):
        raise OptionError("dataset", "the tokenizer has neither a BOS nor an EOS token to start from; give 'prompts' under 'self'")
    return token


def check_ids(rows: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Raise `StageError` where a token has no row in the embeddings."""
    beyond = next((token for row in rows if max(row, default=0) >= embeddings for token in row if token >= embeddings), None)
    if beyond is not None:
        token = tokenizer.convert_ids_to_tokens(beyond)
        rows_said = f"the model has {embeddings} token embeddings (ids 0 to {embeddings - 1})"
        if token is None:
            raise StageError(_explain_unknown_id(tokenizer, beyond, rows_said))
        raise StageError(
            f"token {token!r} has the id {beyond}, but {rows_said}; "
            "tokens were added to the tokenizer and not to the model: use the tokenizer the model was trained with, "
            f"or call resize_token_embeddings({len(tokenizer)}) on the model and train it"
        )


def _explain_unknown_id(tokenizer: PreTrainedTokenizerBase, beyond: int, rows_said: str) -> str:
    """For an id that the tokenizer gives and that is none of its vocabulary's: of its post-processor, which has ids of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    processor = {} if backend is None else json.loads(backend.to_str()).get("post_processor") or {}
    name = next((name for name, known in _ids_of(processor) if known == beyond), None)
    if name is None:
        return f"the tokenizer gives the id {beyond}, which no token of its vocabulary has, but {rows_said}; mend the tokenizer"
    vocabulary = tokenizer.get_vocab()
    known_as = f"gives that token the id {vocabulary[name]}" if name in vocabulary else "has no such token"
    return (
        f"the post-processor of the tokenizer (tokenizer.json) adds {name!r} with the id {beyond}, but {rows_said}; the vocabulary "
        f"{known_as}: write the right id there, or take the token out of the post-processor"
    )


def _ids_of(processor: Any) -> Iterator[tuple[str, int]]:
    """Special tokens of a post-processor and their ids: of templates, of BERT's and RoBERTa's, and of sequences of these."""
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int):
            yield processor[0], processor[1]
        else:
            for part in processor:
                yield from _ids_of(part)
    elif isinstance(processor, dict):
        if isinstance(processor.get("ids"), list) and isinstance(processor.get("id"), str):
            tokens = processor.get("tokens") or [processor["id"]] * len(processor["ids"])
            yield from zip(tokens, processor["ids"], strict=False)
        else:
            for part in processor.values():
                yield from _ids_of(part)
