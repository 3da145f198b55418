"""What llama.cpp computes for a config: where a file must say more than its converter writes, and where no file can say it.

Read in llama.cpp at commit 0c1e570 (`src/models`, `ggml/src`), which llama-cpp-python 0.3.36 holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..consumers import LLAMA_CPP, find_misreadings

Config = Mapping[str, Any]

WITH_WINDOWS = frozenset(
    (
        *("afmoe", "cohere2", "cohere2_moe", "deepseek_v4", "dots3_note", "dots3_note_text", "exaone4", "exaone_moe"),
        *("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
        *("gemma4_unified_text", "gpt_oss", "granite_swa", "granitemoe_swa", "laguna", "lfm2", "llama4", "llama4_text", "maple"),
        *("mellum", "mimo_v2_flash", "muse_glimmer", "muse_glimmer_text", "olmo3", "plamo3", "step3p5", "step3p7"),
    )
)
"""`model_type`s for which llama.cpp reads a window of attention from the file. It runs all others without."""
ALWAYS_WINDOWS = ("mistral", "ministral3", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "starcoder2")
"""Those of the others whose layers all have the window of `sliding_window`, unless `layer_types` says otherwise."""
_WINDOWS = {"sliding_attention", "chunked_attention"}


def explain_refusal(config: Config) -> str | None:
    """Why no GGUF file can hold the model with this decoder config, with all that its class derives; None where one can."""
    untold = [misreading for misreading in find_misreadings(config, LLAMA_CPP) if misreading.placing.array is None]
    if untold:
        return (
            f"{untold[0]}, and no GGUF file can tell it; `prune: {{among: regular}}` chooses layers that leave the pattern as it is"
        )
    for check in (_check_windows, _check_scale, _check_depth, _check_minicpm3, _check_llama4):
        reason = check(config)
        if reason is not None:
            return reason
    return None


def find_arrays(config: Config) -> dict[str, list[bool]]:
    """Keys, after the architecture's name, that a file needs besides what the converter writes, with a flag by layer."""
    arrays = {misreading.placing.array for misreading in find_misreadings(config, LLAMA_CPP)}
    return {array: [name != "full_attention" for name in config["layer_types"]] for array in arrays if array is not None}


def name_ignored_window(config: Config) -> int | None:
    """The window in tokens that llama.cpp leaves out of a model whose layers all have it; None where there is none."""
    model_type, window = config.get("model_type"), config.get("sliding_window")
    if model_type in WITH_WINDOWS or not isinstance(window, int) or not config.get("use_sliding_window", True):
        return None
    layer_types = set(config.get("layer_types") or (["sliding_attention"] if model_type in ALWAYS_WINDOWS else []))
    return window if layer_types and layer_types <= _WINDOWS else None


def rounds_yarn(config: Config) -> bool:
    """Whether llama.cpp rounds the bounds between YaRN's frequencies where the model does not (`truncate: false`).

    ggml_rope_yarn_corr_dims in ggml/src/ggml.c rounds in any case; logits differ a little, at all lengths.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("truncate") is False


def explain_deviations(config: Config) -> list[str]:
    """What llama.cpp computes in another way, which no file can change, a line each, where files are written all the same."""
    lines = []
    window = name_ignored_window(config)
    if window is not None:
        lines.append(f"llama.cpp has no windows for {config['model_type']}: beyond {window} tokens it computes another model")
    if rounds_yarn(config):
        lines.append("llama.cpp rounds the bounds of YaRN, which this model leaves exact (truncate: false): logits differ a little")
    return lines


def _check_windows(config: Config) -> str | None:
    model_type, layer_types = config.get("model_type"), config.get("layer_types") or []
    windows = [layer for layer, name in enumerate(layer_types) if name in _WINDOWS]
    if model_type not in WITH_WINDOWS and 0 < len(windows) < len(layer_types):
        return f"llama.cpp runs {model_type} without windows of attention, which layers {', '.join(map(str, windows))} have"
    return None


def _check_scale(config: Config) -> str | None:
    """Gemma's scale of attention: llama.cpp knows the largest model by its number of layers."""
    largest = {"gemma2": 46, "gemma3_text": 62}.get(str(config.get("model_type")))
    meant = config.get("query_pre_attn_scalar")
    if largest is None or not isinstance(meant, int | float):
        return None
    depth = config["num_hidden_layers"]
    taken = config["hidden_size"] // config["num_attention_heads"] if depth == largest else config["head_dim"]
    if math.isclose(taken, meant):
        return None
    return (
        f"llama.cpp scales attention by 1/sqrt({taken}) in a {config['model_type']} of {depth} layers, where this model has "
        f"1/sqrt({meant:g}) (query_pre_attn_scalar), and no GGUF file can tell it"
    )


def _check_depth(config: Config) -> str | None:
    model_type, depth = config.get("model_type"), config.get("num_hidden_layers")
    layer_types = config.get("layer_types") or []
    if model_type == "exaone4" and depth != 64 and "sliding_attention" in layer_types:
        return f"llama.cpp gives exaone4 windows of attention only where it has 64 layers, and this model has {depth}"
    shared = config.get("num_kv_shared_layers") or 0
    if model_type == "gemma3n_text" and isinstance(depth, int) and depth - shared != 20:
        return (
            f"llama.cpp takes the first 20 layers of gemma3n for those with keys and values of their own, and this model has "
            f"{depth - shared}"
        )
    if model_type == "cohere" and isinstance(depth, int) and bool(config.get("use_qk_norm")) != (depth >= 64):
        has = "has" if config.get("use_qk_norm") else "has no"
        return (
            f"llama.cpp knows by the number of layers whether cohere normalises queries and keys, from 64 on, and this model {has} "
            f"such norms and {depth} layers"
        )
    if model_type in {"deepseek_v2", "deepseek_v3"}:
        is_lite = depth in {26, 27} or (depth == 48 and config.get("vocab_size") == 128256)
        if is_lite != (config.get("q_lora_rank") is None):
            return (
                f"llama.cpp knows by the number of layers whether the queries of {model_type} are compressed, and takes one of "
                f"{depth} layers for a model {'without' if is_lite else 'with'} that"
            )
    return None


def _check_minicpm3(config: Config) -> str | None:
    """Numbers that llama.cpp fixes for MiniCPM3. The scale of residuals changes with the number of layers."""
    if config.get("model_type") != "minicpm3":
        return None
    for field, taken in (("scale_depth", 1.4), ("scale_emb", 12), ("dim_model_base", 256)):
        meant = config.get(field)
        if isinstance(meant, int | float) and not math.isclose(meant, taken, rel_tol=1e-6):
            return f"llama.cpp runs minicpm3 with {field} = {taken}, where this model has {meant:g}, and no GGUF file can tell it"
    return None


def _check_llama4(config: Config) -> str | None:
    """Numbers that llama.cpp fixes for Llama 4 with windows."""
    if config.get("model_type") != "llama4_text" or "chunked_attention" not in (config.get("layer_types") or []):
        return None
    fixed: tuple[tuple[str, Any, Callable[[Any], bool]], ...] = (
        ("attention_chunk_size", 8192, lambda value: value == 8192),
        ("attn_temperature_tuning", True, bool),
        ("floor_scale", 8192, lambda value: value == 8192),
        ("attn_scale", 0.1, lambda value: math.isclose(value, 0.1)),
        ("use_qk_norm", config.get("num_local_experts") != 128, lambda v: bool(v) == (config.get("num_local_experts") != 128)),
    )
    for field, taken, is_right in fixed:
        if field in config and not is_right(config[field]):
            return (
                f"llama.cpp runs llama4 with {field} = {taken}, where this model has {config[field]}, and no GGUF file can tell it"
            )
    return None
