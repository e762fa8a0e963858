"""Prints how well-known architectures are split into groups, with the quality of each plan, as Markdown.

    python tools/show_groups.py
    python tools/show_groups.py t5 mixtral
    python tools/show_groups.py --out GROUPS.md

The models have about their usual depth; most are narrow.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.passes.partition import Strategy
from gapfx.plan import Plan
from gapfx.quality import QualityWatch
from gapfx.sparse import CompileOptions, compile_model
from tools.zoo_cases import torchvision_ops

app = typer.Typer(add_completion=False, help=__doc__)
STRATEGIES = ("blocks", "params", "stages")
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
LAYERS = {"encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}


@dataclass(frozen=True)
class Sight:
    """A model with real depth and small width, its inputs, and what its groups are worth."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    judgement: str
    positional: tuple[str, ...] = field(default=())


def _hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library: Any = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**settings)).requires_grad_(True)

    return build


def _call(module: str, name: str, *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(module), name)(*args, **settings)


def _detr() -> nn.Module:
    library: Any = importlib.import_module("transformers")
    backbone = library.ResNetConfig(out_features=["stage4"])
    settings = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return _hf("DetrModel", "DetrConfig", backbone_config=backbone, **settings, **WIDTHS, **LAYERS)()


def _tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12))


def _image(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(2, 3, size, size)}


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def _pair() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


UNET = {"sample_size": 16, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "cross_attention_dim": 32}
SPEECH = {"num_mel_bins": 16, "max_source_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP_TEXT = {**SMALL, "num_hidden_layers": 6, "eos_token_id": 2}
CLIP_VISION = {**SMALL, "num_hidden_layers": 6, "image_size": 64, "patch_size": 16}
SIGHTS: dict[str, Sight] = {
    "resnet50": Sight(
        _call("torchvision.models", "resnet50"),
        _image(64),
        "Bottlenecks stay whole and follow the forward. Uneven, since the three of the last stage hold two thirds of "
        "the weights; `--partition params` makes the largest group as small as whole blocks allow.",
        ("x",),
    ),
    "vit": Sight(
        _call("timm", "create_model", "vit_tiny_patch16_224"),
        _image(224),
        "Three blocks a group: as even as it gets.",
        ("x",),
    ),
    "swin": Sight(
        _call("timm", "create_model", "swin_tiny_patch4_window7_224"),
        _image(224),
        "Three blocks a group across stages; uneven since late blocks are wider, which `--partition params` mends.",
        ("x",),
    ),
    "t5": Sight(
        _hf("T5Model", "T5Config", vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=6, num_heads=4),
        _pair,
        "Halves of the encoder, halves of the decoder: no group mixes the two.",
    ),
    "gpt2": Sight(
        _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=100, n_embd=64, n_layer=12, n_head=4),
        _text,
        "Three layers a group; q, k and v are one weight and stay together.",
    ),
    "llama": Sight(
        _hf("LlamaForCausalLM", "LlamaConfig", **SMALL, num_hidden_layers=12, num_key_value_heads=2),
        _text,
        "Three layers a group; attention and the gated products of a layer grow together.",
    ),
    "mixtral": Sight(
        _hf(
            "MixtralForCausalLM",
            "MixtralConfig",
            **SMALL,
            num_hidden_layers=8,
            num_key_value_heads=2,
            num_local_experts=4,
        ),
        _text,
        "Two layers a group; all experts of a layer and its router grow with it.",
    ),
    "mamba": Sight(
        _hf("MambaForCausalLM", "MambaConfig", vocab_size=100, hidden_size=32, num_hidden_layers=8),
        _text,
        "Two mixers a group, found without any attention to go by.",
    ),
    "unet": Sight(
        _call("diffusers", "UNet2DConditionModel", **UNET, attention_head_dim=8),
        lambda: {
            "sample": torch.randn(1, 4, 16, 16),
            "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 5, 32),
        },
        "Down, middle and up in the order of the forward; cuts lie between a level's blocks, never inside one.",
    ),
    "whisper": Sight(
        _hf(
            "WhisperModel",
            "WhisperConfig",
            vocab_size=100,
            num_hidden_layers=6,
            decoder_start_token_id=1,
            **SPEECH,
            **WIDTHS,
            **LAYERS,
        ),
        lambda: {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": _tokens()},
        "As T5: halves of the encoder, then of the decoder.",
    ),
    "clip": Sight(
        _hf("CLIPModel", "CLIPConfig", text_config=CLIP_TEXT, vision_config=CLIP_VISION),
        lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(2, 3, 64, 64)},
        "Each tower in two halves; no group mixes image and text.",
    ),
    "lstm": Sight(
        lambda: nn.LSTM(32, 64, 4, bidirectional=True),
        lambda: {"input": torch.randn(5, 2, 32)},
        "One layer a group, both directions and all gates of it together.",
    ),
    "detr": Sight(
        _detr,
        lambda: {"pixel_values": torch.randn(1, 3, 128, 128)},
        "In the order of the forward, layers whole; one group holds the end of the backbone and most of the encoder, "
        "and the wide late stages of the backbone make the groups uneven.",
    ),
}


def show(name: str, partition: Strategy = "blocks") -> str:
    """The groups of one model, the quality of its plan, and the judgement."""
    torch.manual_seed(0)
    sight, quality = SIGHTS[name], QualityWatch()
    model, inputs = sight.build(), dict(sight.inputs())
    args = [inputs.pop(key) for key in sight.positional]
    options = CompileOptions(groups=4, partition=partition)
    plan = compile_model(model, lambda m: m(*args, **inputs), options, watchers=(quality,)).plan
    return f"## {name}\n\n{sight.judgement}\n\n```\n{_groups(plan)}\n\n{quality.text(plan)}```\n"


def _groups(plan: Plan) -> str:
    return "\n".join(f"{group.numel:>12,}  {len(group.weights):>3} weights  {group.name}" for group in plan.groups)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(SIGHTS))] = None,
    partition: Annotated[str, typer.Option(help="blocks, params or stages")] = "blocks",
    out: Annotated[Path | None, typer.Option(help="write a Markdown file")] = None,
) -> None:
    """Print the groups of these models; all without names."""
    unknown = [name for name in names or [] if name not in SIGHTS]
    if unknown:
        typer.echo(f"error: no model {unknown[0]!r}; known: {', '.join(SIGHTS)}", err=True)
        raise typer.Exit(2)
    if partition not in STRATEGIES:
        typer.echo(f"error: no partition {partition!r}; known: {', '.join(STRATEGIES)}", err=True)
        raise typer.Exit(2)
    warnings.simplefilter("ignore")
    torchvision_ops.install()
    text = "\n".join(show(name, cast(Strategy, partition)) for name in names or SIGHTS)
    if out:
        head = "# Groups\n\nMade by `python tools/show_groups.py --out GROUPS.md`: four groups each.\n"
        out.write_text(f"{head}\n{text}")
    else:
        typer.echo(text)


if __name__ == "__main__":
    app()
