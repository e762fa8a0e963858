"""Random numbers as a function of (seed, step, micro-batch): resuming needs no generator state.

The stream of a micro-batch depends on its place in the global batch, not on the rank that computes it, so that any
number of ranks draws the same dropout masks and augmentations when the micro-batch size is the same.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_MASK = (1 << 64) - 1


def mixed_seed(*parts: int) -> int:
    """64 well-mixed bits of the parts (the SplitMix64 finaliser of Steele et al., 2014, chained)."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def seed_everything(*parts: int) -> None:
    """Seed torch (all devices), numpy and random from the mixed parts."""
    value = mixed_seed(*parts)
    torch.manual_seed(value)
    np.random.seed(value & 0xFFFF_FFFF)
    random.seed(value)


def generator(*parts: int) -> torch.Generator:
    """A CPU generator of its own, seeded from the mixed parts."""
    return torch.Generator().manual_seed(mixed_seed(*parts))
