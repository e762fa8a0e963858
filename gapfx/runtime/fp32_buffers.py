"""Buffers of a model that trains in bf16: they stay fp32, which some modules cannot take beside bf16 weights."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from gapfx.errors import TaskError


@contextmanager
def telling_of_buffers(module: nn.Module) -> Generator[None]:
    """Around a forward in bf16: a task that fails by two dtypes hears which modules hold fp32 buffers (TaskError)."""
    try:
        yield
    except TaskError as error:
        kinds = _kinds_with_buffers(module)
        if not kinds or not _is_of_two_dtypes(error.what):
            raise
        fix = (
            f"in bf16 buffers stay fp32, here those of {', '.join(kinds)}: a BatchNorm, for one, cannot take that. "
            "Use another norm, such as GroupNorm or LayerNorm, cast buffers where they are used, or train with "
            "--dtype fp32; --debug shows the whole traceback"
        )
        raise TaskError(error.what, where=error.where, fix=fix) from error


def _kinds_with_buffers(module: nn.Module) -> list[str]:
    """Names of the classes of modules that hold fp32 buffers of their own."""
    parts = [(type(part).__name__, part.buffers(recurse=False)) for part in module.modules()]
    return sorted({kind for kind, buffers in parts if any(buffer.dtype is torch.float32 for buffer in buffers)})


def _is_of_two_dtypes(message: str) -> bool:
    """Whether torch names both, as in "expected scalar type BFloat16 but found Float"."""
    return "BFloat16" in message and re.search(r"\b(Float|float)\b", message) is not None
