"""Buffers that a forward replaces: `self.low = torch.minimum(self.low, x.min())` calls no op that could be recorded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from gapfx.capture.leaves import is_script


def assign_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Let the buffer of a module be another tensor, as an assignment to its name does."""
    vars(module)["_buffers"][name] = value


class Buffers:
    """The buffers of a model as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        own = ((module, vars(module)["_buffers"]) for module in model.modules() if not is_script(module))
        self._before: list[tuple[nn.Module, dict[str, Tensor | None]]] = [
            (module, dict(buffers)) for module, buffers in own if buffers
        ]

    def replaced(self) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
        """(module, name of the buffer, the tensor that stands there now); buffers that came or went do not count."""
        for module, before in self._before:
            now: dict[str, Tensor | None] = vars(module)["_buffers"]
            for name, was in before.items():
                if name in now and now[name] is not was:
                    yield module, name, now[name]
