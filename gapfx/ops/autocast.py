"""Autocast for ops of our own: what torch does to the operands of its products and convolutions."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def autocast_like_a_product(
    x: Tensor, values: Tensor, bias: Tensor | None
) -> Generator[tuple[Tensor, Tensor, Tensor | None]]:
    """The operands in autocast's dtype where it is on, and no autocast for what runs inside."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        yield x, values, bias
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield x.to(dtype), values.to(dtype), None if bias is None else bias.to(dtype)
