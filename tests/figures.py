"""Figures for tests: scenes of models, and what stands where in an SVG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from gapfx.capture import capture
from gapfx.compiler import Unit
from gapfx.figure.scene import Model, Scene
from gapfx.passes.partition import Strategy
from gapfx.plan import Plan
from gapfx.sparse import CompileOptions, compile_model
from tests.models import CASES, Experts, Mlp, ResNet, resnet50, resnet_input, transformer, transformer_inputs

SVG = "{http://www.w3.org/2000/svg}"


class UNet(nn.Module):
    """Two levels down and up with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._level(*widths) for widths in ((3, 4), (4, 8), (8, 8)))
        self.up = nn.ModuleList(self._level(*widths) for widths in ((16, 8), (12, 4)))
        self.head = nn.Conv2d(4, 1, 1)

    @staticmethod
    def _level(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        for level, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = level(torch.cat([x, skip], 1))
        return self.head(x)


class DenselyConnected(nn.Module):
    """Every layer takes what all layers before it gave."""

    def __init__(self, num_layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4 * (index + 1), 4) for index in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, -1)))
        return found[-1]


class Repeated(nn.Module):
    """One residual block, run `times` times."""

    def __init__(self, times: int = 4) -> None:
        super().__init__()
        self.times, self.first, self.block, self.last = times, nn.Linear(8, 8), Mlp(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(self.times):
            x = x + self.block(x)
        return self.last(x)


class Towers(nn.Module):
    """Two encoders that meet at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(*(Mlp() for _ in range(3)))
        self.text = nn.Sequential(*(Mlp() for _ in range(3)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.image(image) * self.text(text)


class ManyExperts(Experts):
    """More experts than are drawn one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 9)
        self.experts = nn.ModuleList(Mlp() for _ in range(9))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]]]] = {
    **CASES,
    "resnet-50": (resnet50, lambda: (resnet_input(),)),
    "resnet-101": (lambda: ResNet((3, 4, 23, 3), 4), lambda: (resnet_input(),)),
    "encoder-decoder": (lambda: transformer(6), transformer_inputs),
    "u-net": (UNet, lambda: (torch.randn(1, 3, 8, 8),)),
    "densely-connected": (DenselyConnected, lambda: (torch.randn(2, 4),)),
    "repeated": (Repeated, lambda: (torch.randn(2, 8),)),
    "towers": (Towers, lambda: (torch.randn(2, 8), torch.randn(2, 8))),
    "many-experts": (lambda: nn.Sequential(ManyExperts(), ManyExperts()), lambda: (torch.randn(60, 8),)),
}


def scene_of(
    model: nn.Module, *inputs: Any, groups: int | None = None, strategy: Strategy = "blocks", plan: Plan | None = None
) -> Scene:
    """What the figure of a model shows, planned by the defaults or with a number of groups."""

    def run(module: nn.Module) -> object:
        return module(*inputs)

    drawn = Model.of(Unit(capture(model, run)))
    options = CompileOptions(groups=groups or "auto", partition=strategy)
    return Scene(drawn, compile_model(model, run, options, plan=plan).plan)


def scene(name: str) -> Scene:
    """The scene of one of MODELS."""
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    return scene_of(build(), *inputs())


@dataclass(frozen=True)
class Drawn:
    """A rectangle on the page with its class, what hovering tells, and the texts in it as (class, x, text)."""

    look: str
    title: str
    x: float
    y: float
    width: float
    height: float
    texts: tuple[tuple[str, float, str], ...] = ()

    def overlaps(self, other: Drawn) -> bool:
        """Whether they have a point in common."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def holds(self, other: Drawn) -> bool:
        """Whether the other one is inside."""
        right, bottom = self.x + self.width, self.y + self.height
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= right
            and other.y + other.height <= bottom
        )


def chips(svg: str) -> list[Drawn]:
    """The weights on the page."""
    return list(_chips(ElementTree.fromstring(svg), 0.0, 0.0))


def boxes(svg: str) -> list[Drawn]:
    """The boxes of blocks on the page."""
    columns = ElementTree.fromstring(svg).findall(f"{SVG}g")[-1]
    left, top = _moved(columns, 0.0, 0.0)
    found: list[Drawn] = []
    for group in columns.findall(f"{SVG}g"):
        rect = group.find(f"{SVG}rect[@class='box']")
        if rect is not None:
            x, y, width, height = (float(rect.get(name, "")) for name in ("x", "y", "width", "height"))
            texts = tuple(("l", float(t.get("x", "")) + left, t.text or "") for t in group.findall(f"{SVG}text"))
            found.append(Drawn("box", group.findtext(f"{SVG}title", ""), x + left, y + top, width, height, texts))
    return found


def _chips(node: ElementTree.Element, x: float, y: float) -> Iterator[Drawn]:
    x, y = _moved(node, x, y)
    body = next((rect for rect in node.findall(f"{SVG}rect") if rect.get("class", "").split()[:1] == ["c"]), None)
    title = node.findtext(f"{SVG}title", "")
    if body is not None and title:
        texts = tuple((t.get("class", ""), float(t.get("x", "")), t.text or "") for t in node.findall(f"{SVG}text"))
        yield Drawn(
            node.get("class", ""), title, x, y, float(body.get("width", "")), float(body.get("height", "")), texts
        )
    for child in node.findall(f"{SVG}g"):
        yield from _chips(child, x, y)


def _moved(node: ElementTree.Element, x: float, y: float) -> tuple[float, float]:
    match = re.fullmatch(r"translate\((\S+) (\S+)\)", node.get("transform", ""))
    return (x + float(match[1]), y + float(match[2])) if match else (x, y)
