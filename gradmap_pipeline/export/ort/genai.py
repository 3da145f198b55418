"""The file that tells ONNX Runtime GenAI how to run a graph: https://onnxruntime.ai/docs/genai/reference/config.html"""

from __future__ import annotations

from typing import Any


def make_genai_config(config: Any, *, positions: bool) -> dict[str, Any]:
    """From a text config. The type is a label: the graph says all that differs between architectures.

    `tell_programs` corrects the file name where the graph has another.
    """
    heads = int(config.num_attention_heads)
    end = config.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    start = config.bos_token_id[0] if isinstance(config.bos_token_id, list) else config.bos_token_id
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        **({"position_ids": "position_ids"} if positions else {}),
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    return {
        "model": {
            "type": "llama",
            "bos_token_id": start if start is not None else first_end,
            "eos_token_id": end,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else first_end,
            "context_length": longest,
            "vocab_size": int(config.vocab_size),
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "inputs": inputs,
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "head_size": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
                "hidden_size": int(config.hidden_size),
                "num_attention_heads": heads,
                "num_key_value_heads": int(getattr(config, "num_key_value_heads", None) or heads),
                "num_hidden_layers": int(config.num_hidden_layers),
            },
        },
        # Keys and values that share one buffer need a graph with fused attention.
        "search": {"do_sample": False, "max_length": longest, "num_beams": 1, "past_present_share_buffer": False},
    }
