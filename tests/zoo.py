"""The smallest sensible config of every causal LM that transformers registers, with layers of several kinds where it has them.

`SIZES` shrinks fields by name, whatever the architecture; `CHANGES` holds what one architecture needs besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTH = 6
WINDOW = 8

SIZES: dict[str, Any] = {
    # depth, whatever it is called
    "num_hidden_layers": DEPTH,
    "n_layer": DEPTH,
    "n_layers": DEPTH,
    "num_layers": DEPTH,
    "decoder_layers": DEPTH,
    "encoder_layers": DEPTH,
    "num_blocks": DEPTH,
    # widths
    "vocab_size": 320,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 64,
    "n_inner": 64,
    "dff": 64,
    "dim_ff": 64,
    "d_inner": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "feed_forward_size": 64,
    "intermediate_size_mlp": 64,
    "dense_intermediate_size": 64,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "n_ctx": 128,
    "context_length": 128,
    "type_vocab_size": 2,
    # attention
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "dim_head": 8,
    "d_head": 8,
    "kv_channels": 8,
    "swa_head_dim": 8,
    "attention_head_size": 8,
    "attention_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "rotary_dim": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "local_attention": WINDOW,
    "attention_chunk_size": WINDOW,
    "floor_scale": 16,
    "keep_window_size": WINDOW,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "zero_expert_num": 2,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "time_step_rank": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "n_mamba_heads": 2,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "lru_width": 32,
    "block_multiple_of": 8,
    # what is particular to a few
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 320,
    "laurel_rank": 8,
    "rel_extent": 16,
    "d_rel": 4,
    "block_size": 8,
    "adapter_rank": 8,
    "router_hidden_size": 16,
    "gated_norm_rank": 4,
    "unpadded_vocab_size": 320,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "query_pre_attn_scalar": 8,
    "ple_embed_dim": 16,
    "dim_model_base": 32,
    "mem_len": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

ALTERNATING = ["sliding_attention", "full_attention"] * (DEPTH // 2)
LINEAR = ["linear_attention", "linear_attention", "full_attention"] * (DEPTH // 3)
DENSE_BELOW = ["dense"] * 2 + ["sparse"] * (DEPTH - 2)

MLA = {"num_key_value_heads": 4}
"""Latent attention has as many heads for keys as for queries."""

ENCODER = {"is_decoder": True}
"""Encoders that can be run as a causal LM."""

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "out_hidden_size": 32,
}

CHANGES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": ALTERNATING, "num_dense_layers": 2},
    "axk1": {**MLA, "mlp_layer_types": DENSE_BELOW},
    "axk2": {**MLA, "mlp_layer_types": DENSE_BELOW},
    "bailing_hybrid": {**MLA, "layer_types": LINEAR, "mlp_layer_types": DENSE_BELOW},
    "bamba": {"attn_layer_indices": [2, 5]},
    "beam": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_BELOW},
    "bert": ENCODER,
    "bert-generation": ENCODER,
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "camembert": ENCODER,
    "cohere2": {"layer_types": ALTERNATING},
    "cohere2_moe": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_BELOW},
    "cohere_compass_text": {
        "layer_types": ALTERNATING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ALTERNATING},
    },
    "cwm": {"layer_types": ALTERNATING},
    "data2vec-text": ENCODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**MLA, "first_k_dense_replace": 2, "num_experts_per_tok": 2},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 2},
    "deepseek_v32": {**MLA, "first_k_dense_replace": 2, "mlp_layer_types": DENSE_BELOW},
    "dots3_note_text": {**MLA, "num_experts_per_tok": 2, "head_dim": 16, "per_layer_config": {}},
    "dots1": {
        "head_dim": 8,
        "layer_types": ALTERNATING,
        "sliding_window": WINDOW,
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "electra": ENCODER,
    "ernie": ENCODER,
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 4},
    "exaone4": {"layer_types": ALTERNATING},
    "exaone_moe": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_BELOW},
    "flint": {"layer_types": ALTERNATING, "mlp_only_layers": [0, 1]},
    "gemma2": {"layer_types": ALTERNATING},
    "gemma3_text": {"layer_types": ALTERNATING},
    "gemma3n_text": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3},
    "gemma4_text": {"layer_types": ALTERNATING, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma4_unified_text": {
        "layer_types": ALTERNATING,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
    },
    "git": {"vision_config": VISION},
    "glm4_moe": {"first_k_dense_replace": 2},
    "glm4_moe_lite": {**MLA, "mlp_layer_types": DENSE_BELOW},
    "glm_moe_dsa": {**MLA, "mlp_layer_types": DENSE_BELOW},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "gpt_oss": {"layer_types": ALTERNATING},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v3": {"mlp_layer_types": DENSE_BELOW},
    "hy_v4": {"mlp_layer_types": DENSE_BELOW},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**MLA, "layer_types": LINEAR, "mlp_layer_types": DENSE_BELOW},
    "kolibri1": {"layer_types": ALTERNATING},
    "laguna": {
        "layer_types": ALTERNATING,
        "mlp_layer_types": DENSE_BELOW,
        "num_attention_heads_per_layer": [4, 2] * (DEPTH // 2),
    },
    "lfm2": {"layer_types": None, "full_attn_idxs": [2, 5]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_dense_layers": 2},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 3,
        "no_rope_layers": [1, 0] * 3,
        "moe_layers": [1, 3, 5],
    },
    "longcat_flash": {**MLA, "num_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_BELOW},
    "mimo_v2_flash": {"layer_types": ALTERNATING, "mlp_layer_types": DENSE_BELOW},
    "minicpm3": MLA,
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "ministral": {"head_dim": 8, "layer_types": ALTERNATING},
    "modernbert-decoder": {"layer_types": ALTERNATING},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "moe", "mlp", "linear_attention", "full_attention"]},
    "olmo3": {"layer_types": ALTERNATING},
    "olmo_hybrid": {"layer_types": LINEAR},
    "phi4_multimodal": {"vision_config": {**VISION, "crop_size": 16}, "audio_config": {"hidden_size": 16, "num_blocks": 2}},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {"mlp_only_layers": [1], "decoder_sparse_step": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_5_text": {"layer_types": LINEAR},
    "qwen3_moe": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "qwen3_next": {"layer_types": LINEAR, "mlp_only_layers": [1]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {**ENCODER, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local"] * DEPTH},
    "rembert": ENCODER,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roc_bert": {
        **ENCODER,
        "shape_vocab_size": 32,
        "pronunciation_vocab_size": 32,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "roformer": ENCODER,
    "smollm3": {
        "no_rope_layers": [1, 1, 0] * 2,
        "layer_types": ALTERNATING,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "vaultgemma": {"layer_types": ALTERNATING},
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    "xlstm": {"num_heads": 2, "qk_dim_factor": 1.0, "chunk_size": 8, "ffn_round_up_to_multiple_of": 8},
    "xmod": {**ENCODER, "default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "attention_hidden_size": 64},
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "sliding_window": WINDOW, "layer_types": ["hybrid", "hybrid_sliding"] * 3},
}


BYTES = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")}
AUDIO = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}

IMAGE_WORDS = {"<image>": 3, "<|extra_200|>": 4} | {f"<|visual token {n:06}|>": 300 + n for n in range(16)}

PARTS: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 50}
    | {f"{part}_config": BYTES for part in ("patcher", "encoder", "decoder", "global")},
    "emu3": {
        "text_config": "emu3_text_model",
        "vq_config": {"base_channels": 32, "embed_dim": 4, "codebook_size": 16},
        "vocabulary_map": IMAGE_WORDS,
    },
    "fuyu": {"text_config": "persimmon", "patch_size": 2, "hidden_size": 32},
    "gemma3": {"text_config": "gemma3_text", "vision_config": VISION, "mm_tokens_per_image": 1},
    "gemma4": {"text_config": "gemma4_text", "vision_config": None, "audio_config": None},
    "gemma4_unified": {"text_config": "gemma4_unified_text", "vision_config": None, "audio_config": None},
    "got_ocr2": {"text_config": "qwen2", "vision_config": {**VISION, "global_attn_indexes": [1], "mlp_dim": 16}},
    "llama4": {"text_config": "llama4_text", "vision_config": {**VISION, "projector_input_dim": 16, "projector_output_dim": 16}},
    "mllama": {"text_config": "mllama_text_model", "vision_config": VISION},
    "moss_transcribe_diarize": {"text_config": "qwen3", "audio_config": AUDIO},
    "qwen3_5": {"text_config": "qwen3_5_text", "vision_config": VISION},
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text", "vision_config": VISION},
    "qwen4_exp": {"text_config": "qwen4_exp_text", "vision_config": VISION},
}
"""Models of several parts: each part's fields, or its type."""


def make_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Config of a model of about ten thousand parameters, with some fields changed."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[model_type]
    if model_type in PARTS:
        parts = {name: make_config(part).to_dict() if isinstance(part, str) else part for name, part in PARTS[model_type].items()}
        return made(**parts)
    try:
        known = made().to_dict()
    except Exception:
        known = dict.fromkeys(SIZES, 0)
    fields = {name: value for name, value in SIZES.items() if known.get(name) is not None}
    return made(**{**fields, **CHANGES.get(model_type, {}), **changes})
