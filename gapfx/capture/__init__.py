"""Capture: one real forward of a model, recorded as an fx graph with the scope, shape and parameters of every op."""

from __future__ import annotations

from gapfx.capture.eval_reads import EvalReads, eval_reads
from gapfx.capture.evaluation import capture_eval
from gapfx.capture.facts import Capture, Parameter, Use
from gapfx.capture.outline import outline
from gapfx.capture.record import capture
from gapfx.capture.values import tensors_in

__all__ = [
    "Capture",
    "EvalReads",
    "Parameter",
    "Use",
    "capture",
    "capture_eval",
    "eval_reads",
    "outline",
    "tensors_in",
]
