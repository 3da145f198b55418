"""Where a recipe's model comes from, and its folder on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..errors import ModelError, first_line
from . import depth
from .files import INDEX, TEMPLATES, check_folder, check_inside, find_shards, read_json, read_weight_map
from .forecast import ModelForecast
from .short_form import ACCEPTED, read_short_form
from .sizes import check_sizes, read_shapes

BUILTIN_FOLDER = Path(__file__).parent.parent / "builtin" / "model"

_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.md", "*.bpe", "*.codes", "*.tokenizer"]
_HUB_LICENCES = [
    "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in pattern)
    for pattern in ("*license*", "*licence*", "copying*", "*notice*", "*use_policy*")
]
_HUB_OTHERS = ["consolidated*", "original/*", "onnx/*", "*/*"]
"""Formats of other programs that lie beside the weights, and subfolders."""
_LONGEST_REVISION = 255
_OBJECTS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files beside config.json that hold an object, where they are there."""


class ModelSource(BaseModel):
    """The model a recipe starts from: exactly one of `path`, `id` and `builtin`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path | None = Field(None, description="Folder in the Hugging Face format: config.json and safetensors files.")
    id: str | None = Field(None, description="Model on the Hugging Face hub, `owner/name`.", min_length=1)
    builtin: Literal["docs-llama"] | None = Field(None, description="The small Llama that comes with gradmap-pipeline.")
    revision: str | None = Field(None, description="Commit, tag or branch of a hub model; a commit makes the recipe repeatable.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Floating-point type of exported weights. Default: the checkpoint's own."
    )

    @model_validator(mode="before")
    @classmethod
    def _take_short_form(cls, data: Any) -> Any:
        if isinstance(data, str):
            return read_short_form(data)
        if data is None or isinstance(data, bool | int | float | list):
            raise ValueError(f"found {json.dumps(data)[:100]}, accepted: {ACCEPTED}")
        return data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        """The mapping, or the text that stands for one."""
        given: dict[str, Any] = handler(core)
        schema = handler.resolve_ref_schema(given)
        mapping = dict(schema)
        schema.clear()
        text = {"type": "string", "description": f"Short form: {ACCEPTED}.".replace(", or a mapping", "")}
        schema |= {"anyOf": [text, mapping], "description": mapping.get("description", "")}
        return given

    @field_validator("id")
    @classmethod
    def _must_be_hub_name(cls, name: str | None) -> str | None:
        if name is not None:
            from huggingface_hub.errors import HFValidationError
            from huggingface_hub.utils._validators import validate_repo_id

            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"found {name[:100]!r}, accepted: the name of a hub model, as owner/name") from error
        return name

    @field_validator("revision")
    @classmethod
    def _must_be_revision(cls, revision: str | None) -> str | None:
        if revision is not None:
            parts = revision.split("/")
            is_named = revision.isprintable() and " " not in revision and "\\" not in revision
            if not is_named or len(revision) > _LONGEST_REVISION or any(part in ("", ".", "..") for part in parts):
                raise ValueError(f"found {revision[:100]!r}, accepted: a commit, tag or branch")
        return revision

    @model_validator(mode="after")
    def _one_place(self) -> ModelSource:
        given = [name for name in ("path", "id", "builtin") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'path', 'id' and 'builtin'; found {' and '.join(map(repr, given)) or 'none'}")
        if self.revision is not None and self.id is None:
            raise ValueError("'revision' belongs to a hub model, given by 'id'")
        return self

    @property
    def name(self) -> str:
        """The name that the recipe has for it."""
        return self.id or str(self.path or self.builtin)

    def find_folder(self) -> Path | None:
        """Folder of the model if it is on this machine, without a network. Raises `ModelError` when a path is no model."""
        if self.id is not None:
            cached = _find_in_hub_cache(self.id, self.revision)
            if cached is not None:
                check_model_folder(cached)
            return cached
        folder = BUILTIN_FOLDER if self.builtin else self.path
        assert folder is not None
        check_model_folder(folder)
        return folder

    def fetch_folder(self) -> Path:
        """Folder of the model, downloaded from the hub where needed."""
        folder = self.find_folder()
        if folder is not None:
            return folder
        assert self.id is not None
        from huggingface_hub import hf_hub_download, snapshot_download

        try:
            config = Path(hf_hub_download(self.id, "config.json", revision=self.revision))
            check_config(load_config(config.parent), self.id)  # before gigabytes of weights
            wanted = [*_HUB_FILES, *_HUB_LICENCES]
            folder = Path(snapshot_download(self.id, revision=self.revision, allow_patterns=wanted, ignore_patterns=_HUB_OTHERS))
            snapshot_download(self.id, revision=folder.name, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        except ModelError:
            raise
        except Exception as error:  # the hub client raises a dozen unrelated types for the same user-facing fact
            raise ModelError(
                f"cannot get model {self.id!r} from the Hugging Face hub ({type(error).__name__}: {first_line(error)}); "
                "check the name and the network, or download it elsewhere and use `model: {path: FOLDER}`"
            ) from error
        check_model_folder(folder)
        return folder

    def forecast(self) -> ModelForecast:
        """What config.json says, if it is on this machine."""
        folder = self.find_folder()
        if folder is None:
            return ModelForecast()
        config = load_config(folder)
        check_sizes(config, read_shapes(folder), folder)
        layers = count_layers(config)
        kept = None if layers is None else tuple(range(layers))
        positions, config = count_positions(config), text_config(config)
        return ModelForecast(layers=layers, kept=kept, positions=positions, config=config, folder=folder, dtype=self.dtype)


def check_model_folder(folder: Path) -> None:
    """Raise `ModelError` unless this is a folder that holds a causal LM in safetensors."""
    try:
        is_folder = folder.is_dir()
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise ModelError(f"{str(folder)[:100]!r} is not a path of a folder ({error})") from error
    if not is_folder and not folder.exists():
        raise ModelError(f"no folder {str(folder)!r}; relative paths start at the current folder, {str(Path.cwd())!r}")
    if not is_folder:
        raise ModelError(f"{str(folder)!r} is a file; name the folder of a model")
    try:
        check_folder(folder)
    except OSError as error:
        raise ModelError(f"{str(folder)!r} cannot be read: {error.strerror or error}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{str(folder)!r} is not a model folder: it has no config.json")
    check_config(load_config(folder), str(folder))
    if not any(folder.glob("*.safetensors")) and not (folder / INDEX).is_file():
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        holds = f"only {others[0]!r}, which is a pickle and is never opened" if others else "no weights"
        raise ModelError(f"{str(folder)!r} has {holds}; weights must be in *.safetensors files (save_pretrained writes them)")
    find_shards(folder)
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_json(folder / name)


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise `ModelError` where config.json alone says that the model cannot be pruned."""
    text = text_config(config)
    quantised = next((part[key] for part in (config, text) for key in _QUANTISED_KEYS if part.get(key) is not None), None)
    if quantised == {}:
        raise ModelError(f"config.json of {name!r} has an empty 'quantization_config', which transformers refuses; remove it")
    if quantised is not None:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else "unknown method"
        raise ModelError(f"{name!r} is already quantised ({method}); prune the original model first, then quantise")
    if config.get("is_encoder_decoder") or "decoder_layers" in config or "num_decoder_layers" in config:
        model_type = config.get("model_type", "of no type")
        raise ModelError(f"{name!r} is an encoder-decoder model ({model_type}); only a decoder that stands alone can be pruned")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(item, str) for item in named)):
        raise ModelError(
            f"config.json of {name!r} has {str(named)[:60]!r} as 'architectures'; accepted: a list of names of classes"
        )
    for part in (config, text):
        for key in ("dtype", "torch_dtype"):
            named = part.get(key)
            if named is not None and not (isinstance(named, str) and named.removeprefix("torch.") in _FLOATS):
                raise ModelError(f"config.json of {name!r} has {str(named)[:60]!r} as {key!r}; accepted: {', '.join(_FLOATS)}")
        for key in (*depth.LAYER_COUNTS, *_POSITION_KEYS):
            number = part.get(key)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ModelError(f"config.json of {name!r} has {str(number)[:60]!r} as {key!r}; accepted: a whole number from 1")


def load_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it stands; `check_sizes` says which of its numbers may be infinite."""
    check_inside(folder, folder / "config.json")
    return read_json(folder / "config.json", may_be_infinite=True)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that speaks of the text decoder: all of it, where it has no such part."""
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ModelError(f"config.json must hold an object as 'text_config', found {type(text).__name__}")
    return config if text is None else text


def count_layers(config: dict[str, Any]) -> int | None:
    """Number of decoder layers, or None where only the architecture's class knows it."""
    return depth.count_layers(text_config(config))


def count_positions(config: dict[str, Any]) -> int | None:
    """Longest sequence the model is made for, in tokens, where its config says so."""
    text = text_config(config)
    return next((int(text[key]) for key in _POSITION_KEYS if isinstance(text.get(key), int)), None)


def _find_in_hub_cache(model_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model_id, "config.json", revision=revision)
    folder = Path(config).parent if isinstance(config, str) else None
    return folder if folder is not None and _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether a download got as far as a tokenizer and every shard."""
    try:
        shards = set(read_weight_map(folder).values()) if (folder / INDEX).is_file() else {"model.safetensors"}
    except ModelError:
        return False
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken"))
    return has_tokenizer and all((folder / shard).is_file() for shard in shards)
