"""timm: one small variant of every architecture module."""

from __future__ import annotations

import importlib
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import nn

from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.torchvision_ops import install

install()
timm: Any = importlib.import_module("timm")

# Which of a module's variants are small: the first of these that its name has.
SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxtiny",
    "xtiny",
    "xxs",
    "tiny",
    "_s0",
    "050",
    "micro",
    "mini",
    "small",
)
MAX_SIZE = 224
# Smaller than what the rule finds.
CHOSEN = {
    "fasternet": "fasternet_t0",
    "iformer": "iformer_s",
    "metaformer": "poolformer_s12",
    "mlp_mixer": "mixer_s32_224",
    "pit": "pit_ti_224",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "tresnet": "tresnet_m",
    "tnt": "tnt_s_legacy_patch16_224",
}
# Modules whose smallest model is large: fewer blocks of the same kind.
SHALLOW = {
    "beit_base_patch16_224": {"depth": 3},
    "deepseek_vit_412m": {"depth": 3},
    "gemma4_vit_167m": {"depth": 3},
    "naflexvit_base_patch16_gap": {"depth": 3},
    "qwen3_vit_88m": {"depth": 3},
    "samvit_base_patch16_224": {"depth": 3, "global_attn_indexes": (1,)},
}
# Smaller images than those that a model was made for: full size takes minutes a step.
PIXELS = {
    "convmixer_768_32": 112,
    "csatv2": 256,
    "deepseek_vit_412m": 168,
    "gemma4_vit_167m": 240,
    "inception_resnet_v2": 160,
    "inception_v4": 160,
    "mobilenetv5_base": 128,
    "naflexvit_base_patch16_gap": 224,
    "nasnetalarge": 160,
    "pnasnet5large": 160,
    "qwen3_vit_88m": 256,
    "sam2_hiera_tiny": 256,
}
# Models that are built for one size of image.
TOLD_PIXELS = {"deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m"}
# Modules whose models are mostly attention.
TRANSFORMERS = {
    "beit",
    "cait",
    "coat",
    "convit",
    "crossvit",
    "davit",
    "deepseek_vit",
    "deit",
    "eva",
    "gcvit",
    "gemma4_vit",
    "hiera",
    "hieradet_sam2",
    "levit",
    "maxxvit",
    "mobilevit",
    "mvitv2",
    "naflexvit",
    "nest",
    "nextvit",
    "pit",
    "pvt_v2",
    "qwen3_vit",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "tiny_vit",
    "tnt",
    "twins",
    "visformer",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
    "volo",
    "xcit",
}
SAMPLE = (
    "cait_xxs24_224",
    "coat_tiny",
    "edgenext_small",
    "fastvit_t8",
    "ghostnet_050",
    "mixer_s32_224",
    "pit_ti_224",
    "poolformer_s12",
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_resnet",
    "starnet_s050",
    "test_vit",
)
SLOW = 300.0


def cases() -> list[Case]:
    """One case a module of timm that registers models."""
    return [
        _case(module, CHOSEN.get(module) or _smallest(timm.list_models(module=module)))
        for module in timm.list_modules()
    ]


def _case(family: str, name: str) -> Case:
    kind = "vision transformer" if family in TRANSFORMERS else "CNN"
    return Case("timm", family, name, partial(_build, name), partial(_batch, name), kind=kind, seconds=SLOW)


def _smallest(names: list[str]) -> str:
    ranks: dict[str, tuple[int, int]] = defaultdict(lambda: (len(SMALL), 0))
    for name in names:
        rank = next((index for index, word in enumerate(SMALL) if word in name), len(SMALL))
        ranks[name] = (rank, _size(name))
    return min(names, key=lambda name: (ranks[name], len(name), name))


def _size(name: str) -> int:
    config = timm.get_pretrained_cfg(name)
    return config.input_size[1] if config else MAX_SIZE


def _build(name: str) -> nn.Module:
    told = {"img_size": PIXELS[name]} if name in TOLD_PIXELS else {}
    return timm.create_model(name, pretrained=False, num_classes=10, **SHALLOW.get(name, {}), **told)


def _batch(name: str, size: int) -> Inputs:
    config = timm.get_pretrained_cfg(name)
    pixels = PIXELS.get(name) or (config.input_size[1] if config else MAX_SIZE)
    return Inputs((torch.randn(size, 3, pixels, pixels),))
