"""transformers: every model type of its registry, from small configurations."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.transformers_configs import small_config
from tools.zoo_cases.transformers_inputs import RECIPES

transformers: Any = importlib.import_module("transformers")
auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
transformers.logging.set_verbosity_error()

# Recipe of inputs -> model types that take it; all others take text.
TYPES_OF: Mapping[str, str] = {
    "pixels": (
        "aimv2_vision_model beit chinese_clip_vision_model clip_vision_model conditional_detr convnext "
        "convnextv2 dab-detr data2vec-vision deformable_detr deit detr dinov2 dinov2_with_registers "
        "dinov3_convnext dinov3_vit donut-swin dpt efficientnet focalnet gemma3n_vision glpn hgnet_v2 hiera "
        "ijepa internvl_vision layoutlmv3 levit mask2former maskformer maskformer-swin mgp-str mlcd "
        "mlcd_vision_model mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 pixio pixtral poolformer "
        "pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec pvt_v2 qianfan_ocr_vision radio regnet "
        "resnet rt_detr rt_detr_v2 sam3_vision_model sam3_vit_model sam_hq_vision_model sam_vision_model "
        "sapiens2 segformer siglip_vision_model swiftformer swin swin2sr swinv2 table-transformer textnet "
        "timm_wrapper tipsv2_vision_model vit vit_mae vit_msn vitdet yolos"
    ),
    "text_to_text": (
        "bart bigbird_pegasus blenderbot blenderbot-small florence2 fsmt led longt5 m2m_100 marian mbart mt5 "
        "mvp nllb-moe pegasus pegasus_x plbart prophetnet seamless_m4t seamless_m4t_v2 switch_transformers t5 "
        "t5gemma t5gemma2 umt5"
    ),
    "pixels_and_text": (
        "aimv2 altclip blip bridgetower chinese_clip clip clipseg granite_docling_vision grounding-dino "
        "groupvit idefics3_vision metaclip_2 mm-grounding-dino owlv2 owlvit sam3 sam3_lite_text "
        "sam3_lite_text_text_model siglip smolvlm_vision vilt vision-text-dual-encoder"
    ),
    "patches_as_states": (
        "cohere_compass_vision glm4v_moe_vision glm4v_vision glm5_next_vision glm_ocr_vision "
        "qwen3_5_moe_vision qwen3_5_vision qwen3_vl_moe_vision qwen3_vl_vision qwen4_exp_vision"
    ),
    "wave_in_channels": (
        "dac encodec mimi mimi_encoder pe_audio_encoder pocket_tts_audio_tokenizer "
        "pocket_tts_audio_tokenizer_encoder vibevoice_acoustic_tokenizer xcodec"
    ),
    "wave": ("data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm"),
    "frames_of_features": (
        "lasr_ctc lasr_encoder nemotron3_5_transcribe_asr_audio nemotron3_diarization_audio "
        "nemotron_asr_streaming_encoder parakeet_ctc parakeet_encoder wav2vec2-bert"
    ),
    "bands_of_features": (
        "glmasr_encoder granite_speech5_ctc granite_speech5_encoder moss_transcribe_diarize_audio "
        "qwen2_audio_encoder voxtral_encoder voxtral_realtime_encoder"
    ),
    "features_to_text": "canary cohere_asr nemotron_asr_streaming parakeet_rnnt parakeet_tdt speech_to_text",
    "patches_as_pixels": "cosmos3_edge_vision glm_image_vision hunyuan_vl_vision lfm3_vl_vision",
    "forecast": "autoformer informer time_series_transformer",
    "video": "timesformer videomae vivit",
    "channels_of_series": "patchtsmixer patchtst",
    "video_of_videos": "videoprism_vision_model vjepa2",
    "wave_to_text": "moonshine",
    "films_and_text": "xclip",
    "spectrogram_values": "audio-spectrogram-transformer",
    "decisions": "decision_transformer",
    "large_pixels": "pp_ocrv5_mobile_rec",
    "long_text": "reformer",
    "bands_to_text": "whisper",
}
RECIPE_OF = {model_type: recipe for recipe, types in TYPES_OF.items() for model_type in types.split()}

# Quick and unlike each other: what every run of the tests can afford.
SAMPLE: frozenset[str] = frozenset(
    [
        "albert",
        "bert",
        "bloom",
        "clip",
        "convnextv2",
        "deberta-v2",
        "detr",
        "distilbert",
        "falcon",
        "gemma2",
        "gpt2",
        "gpt_neox",
        "llama",
        "longformer",
        "mamba",
        "mixtral",
        "mobilebert",
        "opt",
        "qwen3",
        "roberta",
        "rwkv",
        "swin",
        "t5",
        "vit",
        "wav2vec2",
        "whisper",
        "xlnet",
    ]
)


def cases() -> list[Case]:
    """One case a model type that has a model of its own."""
    return [_case(model_type, name) for model_type, name in auto.MODEL_MAPPING_NAMES.items() if model_type.islower()]


def _case(model_type: str, names: str | tuple[str, ...]) -> Case:
    name = names if isinstance(names, str) else names[0]
    return Case(
        "transformers", model_type, model_type, partial(_build, model_type, name), partial(_batch, model_type, name)
    )


def _build(model_type: str, name: str) -> nn.Module:
    return getattr(transformers, name)(small_config(model_type))


def _batch(model_type: str, name: str, size: int) -> Inputs:
    accepted = inspect.signature(getattr(transformers, name).forward).parameters
    found = RECIPES[RECIPE_OF.get(model_type, "text")](small_config(model_type), size)
    return Inputs((), {key: value for key, value in found.items() if key in accepted})
