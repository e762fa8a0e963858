"""The figure of a plan: the graph of layers with the groups in colours, as `gapfx plan --figure` writes it."""

from __future__ import annotations

from gapfx.figure.svg import MARKER, Sketch

__all__ = ["MARKER", "Sketch"]
