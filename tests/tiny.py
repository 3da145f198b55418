"""Tiny models and texts, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL,
    "phi3": SMALL,
    "gemma2": {**SMALL, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mixtral": {**SMALL, "num_local_experts": 4},
    "gpt2": {
        "vocab_size": 300,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": 300,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def make_model(folder: Path, architecture: str = "llama", *, tied: bool = False, seed: int = 0, **changes: Any) -> Path:
    """Write a random model with spread-out logits, and its byte-level tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = changes.pop("dtype", torch.float32)
    config = AutoConfig.for_model(architecture, **{**CONFIGS[architecture], **changes}, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.to(dtype=dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """One token a byte after three special ones; starts every text with BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(
        folder
    )


def make_text(file: Path, words: int = 4000) -> Path:
    """Write a text of random short words."""
    import random

    source = random.Random(0)
    file.write_text(" ".join("".join(source.choices("abcdefgh", k=source.randint(1, 6))) for _ in range(words)))
    return file
