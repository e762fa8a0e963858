"""diffusers: model classes from small configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.torchvision_ops import install

install()
diffusers: Any = importlib.import_module("diffusers")

DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
CROSS_DOWN, CROSS_UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
SMALL: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}

# Class name -> (configuration, inputs at a batch size).
MODELS: Mapping[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    "UNet2DModel": (
        {**SMALL, "sample_size": 16, "down_block_types": DOWN, "up_block_types": UP},
        lambda n: Inputs((_image(n, 3, 16), _times(n))),
    ),
    "UNet2DConditionModel": (
        {**SMALL, "down_block_types": CROSS_DOWN, "up_block_types": CROSS_UP, "cross_attention_dim": 32},
        lambda n: Inputs((_image(n, 4, 16), _times(n), torch.randn(n, 5, 32))),
    ),
    "UNet3DConditionModel": (
        {
            **SMALL,
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
        },
        lambda n: Inputs((torch.randn(n, 4, 3, 16, 16), _times(n), torch.randn(n, 5, 32))),
    ),
    "ControlNetModel": (
        {**SMALL, "down_block_types": CROSS_DOWN, "cross_attention_dim": 32},
        lambda n: Inputs((_image(n, 4, 16), _times(n), torch.randn(n, 5, 32), _image(n, 3, 128))),
    ),
    "AutoencoderKL": (
        {**SMALL, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        lambda n: Inputs((_image(n, 3, 32),)),
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4},
        lambda n: Inputs((_image(n, 3, 32),)),
    ),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (32, 64),
            "up_block_out_channels": (32, 64),
            "norm_num_groups": 8,
        },
        lambda n: Inputs((_image(n, 3, 32),)),
    ),
    "VQModel": (
        {
            **SMALL,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 3,
        },
        lambda n: Inputs((_image(n, 3, 32),)),
    ),
    "DiTTransformer2DModel": (
        {**ATTENTION, "in_channels": 4, "sample_size": 8, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10},
        lambda n: Inputs((_image(n, 4, 8),), {"timestep": _times(n), "class_labels": torch.randint(0, 10, (n,))}),
    ),
    "PixArtTransformer2DModel": (
        {**ATTENTION, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24}
        | {"sample_size": 8, "use_additional_conditions": False},
        lambda n: Inputs(
            (_image(n, 4, 8),),
            {
                "encoder_hidden_states": torch.randn(n, 5, 24),
                "timestep": _times(n),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
    ),
    "SD3Transformer2DModel": (
        {**ATTENTION, "in_channels": 4, "sample_size": 8, "joint_attention_dim": 32, "caption_projection_dim": 32}
        | {"pooled_projection_dim": 24, "out_channels": 4},
        lambda n: Inputs((_image(n, 4, 8), torch.randn(n, 5, 32), torch.randn(n, 24), _times(n))),
    ),
    "FluxTransformer2DModel": (
        {**ATTENTION, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 32}
        | {"pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8)},
        lambda n: Inputs(
            (torch.randn(n, 16, 16), torch.randn(n, 5, 32), torch.randn(n, 24), torch.rand(n)),
            {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
        ),
    ),
    "PriorTransformer": (
        {**ATTENTION, "embedding_dim": 32, "num_embeddings": 5},
        lambda n: Inputs((torch.randn(n, 32), _times(n), torch.randn(n, 32), torch.randn(n, 5, 32))),
    ),
    "UNet1DModel": (
        {
            "block_out_channels": (32, 64),
            "in_channels": 14,
            "out_channels": 14,
            "down_block_types": ("DownResnetBlock1D",) * 2,
            "up_block_types": ("UpResnetBlock1D",),
            "mid_block_type": "MidResTemporalBlock1D",
            "out_block_type": "OutConv1DBlock",
            "time_embedding_type": "positional",
            "use_timestep_embedding": True,
            "act_fn": "swish",
            "layers_per_block": 1,
            "freq_shift": 1.0,
            "flip_sin_to_cos": False,
        },
        lambda n: Inputs((torch.randn(n, 14, 16), _times(n))),
    ),
    "Kandinsky3UNet": (
        {
            "in_channels": 4,
            "time_embedding_dim": 32,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 32, 32),
            "cross_attention_dim": 32,
            "encoder_hid_dim": 24,
        },
        lambda n: Inputs((_image(n, 4, 16), _times(n), torch.randn(n, 5, 24), torch.ones(n, 5))),
    ),
}
SAMPLE = (
    "AutoencoderKL",
    "ControlNetModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "UNet1DModel",
    "UNet2DConditionModel",
    "UNet2DModel",
)


def cases() -> list[Case]:
    """One case a class."""
    return [Case("diffusers", name, name, partial(_build, name), MODELS[name][1], kind="diffusion") for name in MODELS]


def _build(name: str) -> nn.Module:
    return getattr(diffusers, name)(**MODELS[name][0])


def _image(num: int, channels: int, size: int) -> Tensor:
    return torch.randn(num, channels, size, size)


def _times(num: int) -> Tensor:
    return torch.randint(0, 1000, (num,))
