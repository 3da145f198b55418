"""The one place where transformers reads a folder: never its code, never a pickle, never the network, never a question.

Everything else goes through here, and `tests/faults/test_custom_code.py` holds that.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, first_line
from ..machine.atomic_folder import scratch_folder
from ..machine.shortages import is_shortage
from .files import check_folder, read_json
from .sizes import check_sizes, read_shapes
from .source import load_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOCAL = {"trust_remote_code": False, "local_files_only": True}
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


@contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers writes for its developers: bars, warnings, logs; nothing of it reaches standard output."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def read_config(folder: Path, content: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config in a folder, or what it would be with another content of config.json.

    Raises `ModelError` where it needs custom code, or its class refuses it.
    """
    written = load_config(folder)
    _check_known(written, folder)
    from transformers import AutoConfig

    config: PretrainedConfig
    with ExitStack() as stack:
        if content is not None:  # a class of configs reads more from a file than from a dictionary: infinities, older names
            place = stack.enter_context(scratch_folder())
            (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
        stack.enter_context(quietly())
        stack.enter_context(_refusals(f"transformers refuses the config of {str(folder)!r}"))
        config = AutoConfig.from_pretrained(folder if content is None else place, **_LOCAL)
        _answer_plainly(config)
    return config


def _answer_plainly(config: PretrainedConfig) -> None:
    """Undo what a config asks of every call, and is nothing of the model: tuples for outputs, further outputs, checkpointing."""
    for part in (config, config.get_text_config()):
        part.return_dict = True
        for asked in ("output_hidden_states", "output_attentions", "gradient_checkpointing"):
            if getattr(part, asked, False):
                setattr(part, asked, False)


def make_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a config, with new weights, on the device that torch makes tensors on now."""
    from transformers import AutoModelForCausalLM

    with quietly():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def load_model(folder: Path, *, is_whole: bool = False, **options: Any) -> Any:
    """The model in a folder, weights in the types they are stored in.

    `is_whole`: with the parts besides the text decoder, by the class that its config names. `options` go to `from_pretrained`.
    Raises `ModelError`, or `ImportError` where a library that it needs is not there.
    """
    import transformers

    check_folder(folder)
    config = load_config(folder)
    _check_known(config, folder)
    check_sizes(config, read_shapes(folder), folder)
    loader: Any = (_named_class(config) if is_whole else None) or transformers.AutoModelForCausalLM
    with quietly(), _refusals(f"{str(folder)!r} cannot be loaded", (ImportError,)):
        loaded = loader.from_pretrained(folder, dtype="auto", use_safetensors=True, **_LOCAL, **options)
    _answer_plainly((loaded[0] if isinstance(loaded, tuple) else loaded).config)
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. Raises `ModelError`."""
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    check_folder(folder)
    tokenizer: PreTrainedTokenizerBase
    with (
        quietly(),
        _refusals(
            f"{str(folder)!r} has no tokenizer that transformers can load",
            advice="put the model's tokenizer files beside its weights",
        ),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=read_config(folder), **_LOCAL)
        tokenizer("a")
    return tokenizer


def check_generation_config(folder: Path) -> None:
    """Raise `ModelError` where transformers would not load the generation config of a model."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        content = read_json(folder / "generation_config.json")
        with quietly(), _refusals(f"{str(folder / 'generation_config.json')!r} is refused by transformers"):
            GenerationConfig.from_dict(copy.deepcopy(content))


def _check_known(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` where a config requires code that is not in transformers, or for files elsewhere."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise ModelError(
                f"{str(folder)!r} needs custom code (auto_map of its config.json), which is not run: transformers itself has no "
                f"model type {model_type!r}"
            )
        if model_type is None:
            raise ModelError(f"{str(folder / 'config.json')!r} names no 'model_type'")
        raise ModelError(
            f"this transformers has no model type {str(model_type)[:60]!r}, which {str(folder / 'config.json')!r} names"
        )
    if "configuration_files" in config:
        raise ModelError(f"{str(folder / 'config.json')!r} names other files that hold the config; put the one to use in its place")
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in _IMPLEMENTATIONS:
            for name in (key, f"_{key}", f"_{key}_internal"):
                if "/" in str(part.get(name) or ""):
                    raise ModelError(
                        f"{str(folder / 'config.json')!r} requires code from the hub ({name}: {str(part[name])[:60]!r}), which is "
                        "not run; remove that field"
                    )


def _named_class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class of transformers that a config names first among its architectures."""
    import transformers

    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, named, None) if isinstance(named, str) else None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def name_generative_class(folder: Path) -> str | None:
    """The class to name in a config in place of one that the model is not of, or that has no head to predict tokens.

    The model type says what a model is; programs besides transformers go by the class. None: the one there will do.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    named = _named_class(load_config(folder))
    if named is None:
        return None
    config = read_config(folder)
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    wanted: Any = named.config_class or type(config)
    is_of = named is known or isinstance(config, wanted) or isinstance(config.get_text_config(), wanted)
    return known.__name__ if known is not None and not (is_of and named.can_generate()) else None


@contextmanager
def _refusals(what: str, passing: tuple[type[Exception], ...] = (), advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises into one line. Libraries written in Rust raise `PanicException`, which is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit, *passing)) or (
            isinstance(error, Exception) and is_shortage(error)
        ):
            raise
        end = f"; {advice}" if advice else ""
        raise ModelError(f"{what} ({name_error(error)}){end}") from error


def name_error(error: BaseException) -> str:
    """The name of an error and what it says, short."""
    return f"{type(error).__name__}: {first_line(error)[:300]}"
