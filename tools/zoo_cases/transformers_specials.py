"""transformers: what the rules cannot know, as data: configuration values by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
HALF_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 0],
    }
}
SWIN = {"embed_dim": 16, "num_heads": (2, 2, 4, 4), "depths": (2, 2, 2, 2), "window_size": 2, "image_size": 64}
FORECAST = {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 1}
SMALL_HEADS = {"head_dim": 8}
HGNET = {
    "stem_channels": (3, 8, 8),
    "stage_in_channels": (8, 16, 24, 32),
    "stage_mid_channels": (8, 8, 16, 16),
    "stage_out_channels": (16, 24, 32, 48),
}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 48]}
RT_DETR = {"encoder_in_channels": [24, 32, 48], "decoder_in_channels": [32, 32, 32]}
CODEC = {"num_filters": 8, "hidden_size": 32, "upsample_groups": 32}
# Zamba's third layer is a hybrid one; the mixer's heads times their size are twice the width.
ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "linear_attention", "hybrid"]}

# Model type -> values of configuration fields (mappings for nested configurations).
CONFIGS: Mapping[str, Values] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text", "glm_image_text", "glmga_text"), MROPE),
    **dict.fromkeys(("glm4v_text", "glm46v_text", "glm_ocr_text"), MROPE),
    **dict.fromkeys(("glm4v_moe_text",), HALF_MROPE),
    **dict.fromkeys(("swin", "swinv2", "donut-swin", "maskformer-swin"), SWIN),
    **dict.fromkeys(("informer", "autoformer", "time_series_transformer"), FORECAST),
    **dict.fromkeys(("mimi", "mimi_decoder", "pocket_tts_audio_tokenizer"), CODEC),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral"), SMALL_HEADS),
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 64, 96], "depths": [1, 1, 1, 1]},
    "bridgetower": {
        "num_attention_heads": 4,
        "vision_config": {"hidden_size": 64},
        "text_config": {"num_attention_heads": 4},
    },
    "codegen": {"rotary_dim": 8, "n_embd": 32, "n_head": 4},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 1, 2], "drop_path_rate": [0.0, 0.0, 0.1]},
    "d_fine": RT_DETR,
    "deimv2": RT_DETR,
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "gemma3n_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "gptj": {"rotary_dim": 8, "n_embd": 32, "n_head": 4},
    "hgnet_v2": HGNET,
    "pp_doclayout_v3": RT_DETR,
    "pp_doclayout_v4": RT_DETR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48, "num_attention_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "hidden_size": 32, "n_groups": 2, "chunk_size": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "pvt": {"image_size": 64, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "num_buckets": 4},
    "rt_detr": RT_DETR,
    "rt_detr_resnet": RESNET,
    "rt_detr_v2": RT_DETR,
    "sam": {"vision_config": {"output_channels": 32, "image_size": 64}},
    "textnet": {"stem_num_channels": 3, "stem_out_channels": 8, "hidden_sizes": [8, 16, 16, 32, 32]},
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "hidden_size": 32},
    "xlstm": {"hidden_size": 32, "num_heads": 4, "qk_dim_factor": 0.5, "chunk_size": 16},
    "zamba": ZAMBA,
    "zamba2": {**ZAMBA, "num_mem_blocks": 1, "hybrid_layer_ids": [2]},
}
