"""A device as a training sees it, in operations and bytes a second: known by name, given as numbers, or measured."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gapfx.errors import UserError

_SIZE, _ROUNDS = 1024, 9
_NUMBERS = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?):(\d+(?:\.\d+)?(?:e\d+)?)")


@dataclass(frozen=True)
class Profile:
    """Operations of dense products, and bytes of collectives, a second, of one rank."""

    name: str
    flops: float
    bandwidth: float


# Sustained in large products and ring collectives, a round half of the data sheets' peaks.
PROFILES: Mapping[str, Profile] = {
    "a100": Profile("a100", 150e12, 20e9),
    "h100": Profile("h100", 400e12, 40e9),
    "h200": Profile("h200", 400e12, 40e9),
}


def parse_profile(text: str, dtype: torch.dtype) -> Profile:
    """A name, two numbers `FLOPS:BYTES`, or `here`: what this machine does in `dtype`. Raises UserError for others."""
    if text in PROFILES:
        return PROFILES[text]
    if text == "here":
        return measured(dtype)
    found = _NUMBERS.fullmatch(text)
    if found is None or not float(found[1]) or not float(found[2]):
        raise UserError(
            f"there is no profile {text!r}",
            fix=f"take {', '.join(PROFILES)}, here, or operations and bytes a second: 300e12:25e9",
        )
    return Profile(text, float(found[1]), float(found[2]))


def measured(dtype: torch.dtype) -> Profile:
    """This machine: a square product, and a copy in memory, which is the most that ranks on one machine exchange."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    left, right = (torch.randn(_SIZE, _SIZE, device=device).to(dtype) for _ in range(2))
    source = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    flops = 2 * _SIZE**3 / _median_seconds(lambda: left @ right, device)
    return Profile("this machine", flops, source.numel() / _median_seconds(lambda: target.copy_(source), device))


def _median_seconds(action: Callable[[], object], device: torch.device) -> float:
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
