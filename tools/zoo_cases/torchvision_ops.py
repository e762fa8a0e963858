"""Makes torchvision's operators work beside a torch that its binary library was not built for.

The wheel of torchvision is built for CUDA; with the CPU build of torch its library does not load, and the import fails.
`install` defines the operators before that, and gives those that models need an implementation in plain torch.
"""

from __future__ import annotations

import importlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor
from torch.library import Library

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold, float s, int z, float s2) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    "_cuda_version() -> int",
)
# Modules that look for the binary library before they call an operator.
CHECKED = ("boxes", "deform_conv", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool")
# Definitions last as long as the library object.
_LIBRARIES: list[Library] = []


def install() -> None:
    """Define the operators unless torchvision's own are there; call before the first import of torchvision."""
    if _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
        return
    library = Library("torchvision", "DEF")
    _LIBRARIES.append(library)
    for schema in SCHEMAS:
        library.define(schema)
    library.impl("nms", nms, "CompositeExplicitAutograd")
    library.impl("deform_conv2d", deform_conv2d, "CompositeImplicitAutograd")
    library.impl("_cuda_version", lambda: -1, "CompositeImplicitAutograd")
    modules = {name: importlib.import_module(f"torchvision.ops.{name}") for name in CHECKED}
    library.impl("roi_align", roi_align, "CompositeImplicitAutograd")
    for module in modules.values():
        vars(module)["_assert_has_ops"] = lambda: None
    vars(modules["roi_align"])["_has_ops"] = lambda: True


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that stay, best first; `dets` is [N, 4] as x1, y1, x2, y2."""
    # In numpy: thousands of tiny steps.
    corners, order = dets.detach().double().numpy(), scores.detach().argsort(descending=True, stable=True).numpy()
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    keep: list[int] = []
    while len(order):
        best, rest = order[0], order[1:]
        keep.append(int(best))
        low, high = np.maximum(corners[best, :2], corners[rest, :2]), np.minimum(corners[best, 2:], corners[rest, 2:])
        overlap = (high - low).clip(0).prod(1)
        order = rest[overlap / (areas[best] + areas[rest] - overlap) <= iou_threshold]
    return torch.tensor(keep, dtype=torch.int64)


def roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Means of bilinear samples in each bin of each region [regions, channels, height, width].

    `rois` is [regions, 5]: index of the image, x1, y1, x2, y2. A ratio of 0 or less takes as many samples as a bin has
    pixels. torchvision's own version in plain torch samples every pixel of the image for each bin then.
    """
    corners = rois.detach()[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    sizes = (corners[:, 2:] - corners[:, :2]).clamp(min=0.0 if aligned else 1.0)
    if not len(rois):
        return input.new_zeros(0, input.shape[1], pooled_height, pooled_width) + 0 * input.sum()
    regions: list[Tensor] = []
    for image, (left, top), (wide, high) in zip(rois[:, 0].long(), corners[:, :2], sizes, strict=True):
        y = _taps(float(top), float(high), pooled_height, sampling_ratio, input)
        x = _taps(float(left), float(wide), pooled_width, sampling_ratio, input)
        rows, columns = input.shape[2:]
        grid = torch.stack(
            torch.meshgrid(2 * x / max(columns - 1, 1) - 1, 2 * y / max(rows - 1, 1) - 1, indexing="xy"), -1
        )
        taps = F.grid_sample(input[image][None], grid[None], align_corners=True, padding_mode="border")
        inside = ((y >= -1) & (y <= rows))[:, None] & ((x >= -1) & (x <= columns))
        regions.append(F.adaptive_avg_pool2d(taps * inside, (pooled_height, pooled_width)))
    return torch.cat(regions)


def _taps(start: float, size: float, bins: int, ratio: int, like: Tensor) -> Tensor:
    """Places of the samples along one side of a region: the same number in each bin."""
    per_bin = ratio if ratio > 0 else max(math.ceil(size / bins), 1)
    return start + (_count(bins * per_bin, like) + 0.5) * (size / (bins * per_bin))


def deform_conv2d(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """Convolution that samples at `offset` [batch, 2 * offset_groups * kh * kw, height, width], bilinear, 0 outside."""
    (num, _, high, wide), (kh, kw) = input.shape, weight.shape[2:]
    rows, columns = offset.shape[2:]
    moves = rearrange(offset, "n (o k two) h w -> n o k two h w", k=kh * kw, two=2)
    tap_y = (_count(kh, input) * dilation_h).repeat_interleave(kw).view(-1, 1, 1)
    tap_x = (_count(kw, input) * dilation_w).repeat(kh).view(-1, 1, 1)
    y = moves[:, :, :, 0] + tap_y + (_count(rows, input) * stride_h - pad_h).view(-1, 1)
    x = moves[:, :, :, 1] + tap_x + (_count(columns, input) * stride_w - pad_w)
    grid = torch.stack((2 * x / max(wide - 1, 1) - 1, 2 * y / max(high - 1, 1) - 1), -1)
    planes = rearrange(input, "n (o c) h w -> (n o) c h w", o=offset_groups)
    taps = F.grid_sample(planes, rearrange(grid, "n o k h w two -> (n o) (k h) w two"), align_corners=True)
    taps = rearrange(taps, "(n o) c (k h) w -> n o c k h w", n=num, h=rows)
    if use_mask:
        taps = taps * rearrange(mask, "n (o k) h w -> n o 1 k h w", o=offset_groups)
    taps = rearrange(taps, "n o c k h w -> n (o c) k h w")
    taps = rearrange(taps, "n (g c) k h w -> n g c k h w", g=groups)
    kernel = rearrange(weight, "(g o) c kh kw -> g o c (kh kw)", g=groups)
    out = einsum(kernel, taps, "g o c k, n g c k h w -> n g o h w")
    return rearrange(out, "n g o h w -> n (g o) h w") + bias.view(1, -1, 1, 1)


def _count(num: int, like: Tensor) -> Tensor:
    return torch.arange(num, device=like.device, dtype=like.dtype)
