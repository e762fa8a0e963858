"""Puts a model and the random number generators back as they were before a forward."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.capture.leaves import is_script


@contextmanager
def collector_paused() -> Generator[None]:
    """No garbage collection meanwhile: many small objects that stay make it look through all others in vain.

    Afterwards they count as old, so that the next collection of young objects need not look through them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # what the program froze itself stays so
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@contextmanager
def restored(model: nn.Module) -> Generator[None]:
    """Undo on exit, also after an error: RNG states, attributes of modules, and buffers (values and identity).

    Attributes that are a dict, list or set get their content back too: models keep caches in them.
    """
    with ExitStack() as undo:
        undo.callback(_rng_undo())
        for module in list(model.modules()):
            if not is_script(module):
                undo.callback(_attributes_undo(module))
        for buffer in {id(buffer): buffer for buffer in model.buffers()}.values():
            undo.callback(_tensor_undo(buffer))
        yield


def _rng_undo() -> Callable[[], None]:
    steps: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    numpy_random: Any = getattr(sys.modules.get("numpy"), "random", None)
    if numpy_random is not None:
        steps.append((numpy_random.set_state, numpy_random.get_state()))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        steps.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))

    def undo() -> None:
        for put_back, state in steps:
            put_back(state)

    return undo


def _attributes_undo(module: nn.Module) -> Callable[[], None]:
    attributes = dict(vars(module))
    containers = [value for value in attributes.values() if type(value) in (dict, list, set)]
    contents = [(container, container.copy()) for container in containers]

    def undo() -> None:
        now = vars(module)
        now.clear()
        now.update(attributes)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)

    return undo


def _tensor_undo(tensor: Tensor) -> Callable[[], None]:
    value = tensor.detach().clone()

    def undo() -> None:
        with torch.no_grad():
            if tensor.shape != value.shape:
                tensor.set_(value)  # pyright: ignore[reportArgumentType]
            elif not tensor.is_meta and not torch.equal(tensor, value):
                tensor.copy_(value)

    return undo
