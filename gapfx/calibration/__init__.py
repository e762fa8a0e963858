"""How fast each way to run a sparse weight is on this machine: measured on its own shapes, kept, else estimated."""

from gapfx.calibration.cases import Case, Times
from gapfx.calibration.table import Answers, answer

__all__ = ["Answers", "Case", "Times", "answer"]
