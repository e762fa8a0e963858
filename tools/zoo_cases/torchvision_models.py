"""torchvision: every model of its registry."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tools.zoo_cases.cases import Case, Inputs
from tools.zoo_cases.torchvision_ops import install

install()
models: Any = importlib.import_module("torchvision.models")

# Sizes that a model insists on; the others take small images.
SIZES = {"inception_v3": 299, "quantized_inception_v3": 299, "googlenet": 96, "alexnet": 96, "maxvit_t": 224}
FIXED_SIZE = ("vit_",)
VIDEO_SIZES = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}
NUM_CLASSES = 10
# What the parts of the registry are called in the table; all others classify images.
KINDS = {"detection": "detection", "segmentation": "segmentation", "video": "video", "optical_flow": "optical flow"}
ATTENTION = ("vision_transformer", "swin_transformer", "maxvit")
SAMPLE = (
    "efficientnet_b0",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "lraspp_mobilenet_v3_large",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "quantized_mobilenet_v2",
    "r3d_18",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "ssdlite320_mobilenet_v3_large",
)
SLOW = 600.0
# Models of 300 to 640 million weights keep this many blocks of their deepest stage.
SHALLOW = {
    "regnet_y_128gf": ("trunk_output.block3", 1),
    "vit_h_14": ("encoder.layers", 4),
    "vit_l_16": ("encoder.layers", 6),
    "vit_l_32": ("encoder.layers", 6),
}
# Without a compiled operator each region costs milliseconds.
PROPOSALS = {
    "rpn_pre_nms_top_n_train": 60,
    "rpn_post_nms_top_n_train": 30,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_test": 30,
    "box_batch_size_per_image": 16,
}


def cases() -> list[Case]:
    """One case a model, in the order of the registry."""
    return [_case(name) for name in models.list_models()]


def _case(name: str) -> Case:
    family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    plain = "vision transformer" if family in ATTENTION else "CNN"
    kind = KINDS.get(family.partition(".")[0], plain)
    # Two videos of full size take a minute.
    sizes = (1, 2) if name.startswith(("mvit", "swin3d")) else (2, 3)
    batch = partial(_batch, name, family)
    return Case("torchvision", family, name, partial(_build, name), batch, sizes, kind, SLOW)


def _build(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None}
    family = models.get_model_builder(name).__module__
    if "detection" in family or "segmentation" in family:
        options |= {"weights_backbone": None, "num_classes": NUM_CLASSES}
    if "detection" in family:
        # The default resizes every image to 800 pixels.
        options |= {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
        options |= PROPOSALS if "rcnn" in name else {}
    if name.endswith(("googlenet", "inception_v3")):
        options |= {"init_weights": False}
    model = models.get_model(name, **options)
    if name in SHALLOW:
        path, keep = SHALLOW[name]
        owner, _, child = path.rpartition(".")
        blocks = OrderedDict(list(model.get_submodule(path).named_children())[:keep])
        setattr(model.get_submodule(owner), child, nn.Sequential(blocks))
    return model


def _batch(name: str, family: str, size: int) -> Inputs:
    if "detection" in family:
        images = [torch.rand(3, 96, 96) for _ in range(size)]
        return Inputs((images, [_target(family) for _ in images]))
    if "video" in family:
        frames, pixels = VIDEO_SIZES.get(name, (8, 224 if "swin" in name else 64))
        return Inputs((torch.randn(size, 3, frames, pixels, pixels),))
    if "optical_flow" in family:
        return Inputs((torch.rand(size, 3, 128, 128), torch.rand(size, 3, 128, 128)), {"num_flow_updates": 3})
    pixels = 224 if name.startswith(FIXED_SIZE) else SIZES.get(name, 64)
    return Inputs((torch.randn(size, 3, pixels, pixels),))


def _target(family: str) -> dict[str, Tensor]:
    corner = torch.rand(2, 2) * 40
    boxes = torch.cat((corner, corner + 20 + torch.rand(2, 2) * 30), 1)
    target = {"boxes": boxes, "labels": torch.randint(1, NUM_CLASSES, (2,))}
    if family.endswith("mask_rcnn"):
        target["masks"] = torch.randint(0, 2, (2, 96, 96), dtype=torch.uint8)
    if family.endswith("keypoint_rcnn"):
        target["keypoints"] = torch.cat((torch.rand(2, 17, 2) * 90, torch.ones(2, 17, 1)), 2)
    return target
