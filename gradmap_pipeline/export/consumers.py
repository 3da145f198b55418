"""Programs that know the role of a layer by its index, whatever a config lists: how, and how they can be told better.

Every entry says where it was seen, in which version of the program, and whether the program was run or only read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..checkpoint.forecast import ModelForecast

Config = Mapping[str, Any]
Marks = tuple[bool, ...]
"""One flag a layer: whether the layer has a role."""
Program = Literal["llama.cpp", "mlx-lm", "SGLang", "vLLM"]
LayerRole = Literal["full attention", "no rotary embedding", "experts"]

LLAMA_CPP: Program = "llama.cpp"
WINDOWS = "attention.sliding_window_pattern"
"""Key of a GGUF file, after its architecture: a flag by layer, true for a window. llama.cpp takes it before any period."""
_VERSIONS: dict[Program, str] = {LLAMA_CPP: "0c1e570", "mlx-lm": "0.32.2", "SGLang": "0.5.23", "vLLM": "0.32"}


@dataclass(frozen=True)
class Placing:
    """A program takes the last of every `period` layers for those with a role, or the first."""

    program: Program
    types: tuple[str, ...]
    """`model_type` in config.json."""
    role: LayerRole
    period: int
    source: str
    """File of the program."""
    field: str | None = None
    """Config field that holds another period: a number, or text with a letter a layer."""
    array: str | None = None
    """Key of a GGUF file that lists the layers, and goes before the period."""
    is_first: bool = False
    """Whether it takes the first of every `period`."""
    was_run: bool = False
    """Otherwise the source was read."""

    @property
    def version(self) -> str:
        """The version of the program that was run or read."""
        return _VERSIONS[self.program]

    def compute(self, config: Config, depth: int) -> Marks:
        """The layers that the program takes for those with this role in a model of so many, unless an array tells it."""
        told = config.get(self.field) if self.field else None
        period = len(told) if isinstance(told, str) and told else told
        if not isinstance(period, int) or period < 1:
            period = self.period
        place = 0 if self.is_first else period - 1
        return tuple(layer % period == place for layer in range(depth))


_LLAMA4 = ("llama4_text", "llama4")

PLACINGS = (
    Placing(LLAMA_CPP, ("gemma2",), "full attention", 2, "src/models/gemma2.cpp", array=WINDOWS, was_run=True),
    Placing(LLAMA_CPP, ("gemma3_text", "gemma3"), "full attention", 6, "src/models/gemma3.cpp", array=WINDOWS, was_run=True),
    Placing(LLAMA_CPP, ("gpt_oss",), "full attention", 2, "src/models/openai-moe.cpp", array=WINDOWS, was_run=True),
    Placing(LLAMA_CPP, ("cohere2",), "full attention", 4, "src/models/cohere2.cpp", array=WINDOWS, was_run=True),
    Placing(LLAMA_CPP, ("laguna",), "full attention", 4, "src/models/laguna.cpp", array=WINDOWS, is_first=True, was_run=True),
    Placing(LLAMA_CPP, ("afmoe",), "full attention", 4, "src/models/afmoe.cpp", array=WINDOWS),
    Placing(LLAMA_CPP, ("afmoe",), "no rotary embedding", 4, "src/models/afmoe.cpp"),
    Placing(LLAMA_CPP, _LLAMA4, "full attention", 4, "src/models/llama4.cpp", array=WINDOWS, was_run=True),
    Placing(LLAMA_CPP, _LLAMA4, "no rotary embedding", 4, "src/models/llama4.cpp", was_run=True),
    Placing(LLAMA_CPP, _LLAMA4, "experts", 1, "src/models/llama4.cpp", field="interleave_moe_layer_step", was_run=True),
    Placing(LLAMA_CPP, ("smollm3",), "no rotary embedding", 4, "src/models/smollm3.cpp", was_run=True),
    Placing(
        "mlx-lm",
        ("gemma3_text", "gemma3"),
        "full attention",
        6,
        "models/gemma3_text.py",
        field="sliding_window_pattern",
        was_run=True,
    ),
    Placing("mlx-lm", ("cohere2",), "full attention", 4, "models/cohere2.py", field="sliding_window_pattern", was_run=True),
    Placing("mlx-lm", ("exaone4",), "full attention", 1, "models/exaone4.py", field="sliding_window_pattern"),
    Placing("mlx-lm", _LLAMA4, "full attention", 4, "models/llama4.py"),
    Placing("mlx-lm", _LLAMA4, "no rotary embedding", 4, "models/llama4.py"),
    Placing("mlx-lm", _LLAMA4, "experts", 1, "models/llama4.py", field="interleave_moe_layer_step"),
    Placing("mlx-lm", ("qwen3_next",), "full attention", 4, "models/qwen3_next.py", field="full_attention_interval"),
    Placing(
        "mlx-lm", ("qwen3_5_text", "qwen3_5_moe_text"), "full attention", 4, "models/qwen3_5.py", field="full_attention_interval"
    ),
    Placing("SGLang", ("gemma2",), "full attention", 2, "srt/models/gemma2.py"),
    Placing("SGLang", _LLAMA4, "no rotary embedding", 4, "srt/models/llama4.py"),
    Placing("SGLang", _LLAMA4, "experts", 1, "srt/models/llama4.py", field="interleave_moe_layer_step"),
    Placing("SGLang", ("exaone4",), "full attention", 1, "srt/models/exaone4.py", field="sliding_window_pattern"),
    Placing("vLLM", ("gpt_oss",), "full attention", 2, "model_executor/models/gpt_oss.py"),
)
"""The periods that programs fix. Where a program reads `layer_types`, or an array that its converter writes, it has no entry."""


@dataclass(frozen=True)
class Misreading:
    """Where a program would compute another model."""

    placing: Placing
    taken: tuple[int, ...]
    """Layers of the model, counted from 0, that the program takes for those with the role."""
    right: tuple[int, ...]

    def __str__(self) -> str:
        role = self.placing.role
        told = f", unless its file has {self.placing.array!r}, as files of export_gguf have" if self.placing.array else ""
        return (
            f"{self.placing.program} would take {_name(self.taken)} for those with {role}, where the model has {_name(self.right)}"
            f"{told}"
        )


def read_marks(config: Config, role: LayerRole) -> Marks | None:
    """Which layers have a role, by what a config lists; None where it does not list them, or all are alike."""
    if role == "experts":
        indices, depth = config.get("moe_layers"), config.get("num_hidden_layers")
        if not isinstance(indices, list) or not isinstance(depth, int):
            return None
        marks = tuple(layer in indices for layer in range(depth))
    elif role == "no rotary embedding" and isinstance(config.get("no_rope_layers"), list):
        marks = tuple(not uses for uses in config["no_rope_layers"])
    elif isinstance(config.get("layer_types"), list) and (role == "full attention" or config.get("model_type") == "afmoe"):
        marks = tuple(name == "full_attention" for name in config["layer_types"])
    else:
        return None
    return marks


def find_misreadings(config: Config, program: str | None = None) -> list[Misreading]:
    """What programs would compute otherwise, by a decoder's config with all that its class derives.

    `program`: that one alone. Empty where a config lists nothing by layer, or every program finds what it lists.
    """
    misreadings = []
    for placing in PLACINGS:
        if config.get("model_type") not in placing.types or program not in {None, placing.program}:
            continue
        right = read_marks(config, placing.role)
        if right is None:
            continue
        taken = placing.compute(config, len(right))
        if taken != right:
            indices = (tuple(i for i, is_one in enumerate(marks) if is_one) for marks in (taken, right))
            misreadings.append(Misreading(placing, *indices))
    return misreadings


def name_programs(config: Config) -> list[str]:
    """Programs that place layers of this architecture by index, where a config lists layers with several roles."""
    marks = {role: read_marks(config, role) for role in ("full attention", "no rotary embedding", "experts")}
    differing = {role for role, listed in marks.items() if listed is not None and len(set(listed)) > 1}
    programs = (p.program for p in PLACINGS if config.get("model_type") in p.types and p.role in differing)
    return list(dict.fromkeys(programs))


def explain_removal(config: Config, kept: Sequence[int], programs: Collection[str] | None = None) -> list[str]:
    """Programs that would misread a model that keeps these layers of a decoder, a line each; none where nothing is removed.

    `config`: of the whole decoder, with all that its class derives (`complete_config`). `programs`: those alone.
    """
    from ..checkpoint.depth import count_layers, prune_fields
    from ..errors import ModelError

    depth = count_layers(dict(config))
    if depth is None or len(kept) == depth:
        return []
    try:
        pruned = prune_fields(dict(config), dict(config), kept)
    except ModelError:  # refused where the removal is planned
        return []
    misreadings = find_misreadings(pruned)
    return [str(misreading) for misreading in misreadings if programs is None or misreading.placing.program in programs]


def explain_forecast(model: ModelForecast | None, programs: Collection[str] | None = None) -> list[str]:
    """Programs that would misread a model as a plan knows it, a line each; none where it does not know which layers are left.

    `programs`: those alone.
    """
    if model is None or model.config is None or model.kept is None or len(model.kept) == model.config.get("num_hidden_layers"):
        return []
    return explain_removal(complete_config(model.config, model.folder), model.kept, programs)


def find_index_programs(config: Config, folder: Path | None) -> list[str]:
    """Programs that place layers of a model with several kinds of layers by their index, which most removals break.

    `config`: as written, of the decoder. `folder`: of the checkpoint, where it is on this machine.
    """
    return name_programs(complete_config(config, folder))


def complete_config(written: Config, folder: Path | None) -> Config:
    """A decoder's config with what its class derives, where a program places its layers by index and it does not list them."""
    placed: set[LayerRole] = {placing.role for placing in PLACINGS if written.get("model_type") in placing.types}
    if folder is None or all(read_marks(written, role) is not None for role in placed):
        return written
    from ..checkpoint.architecture import full_config

    return full_config(folder)


def _name(layers: Sequence[int]) -> str:
    if not layers:
        return "no layer"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
