"""`capture_eval`: the recording of the forward that runs in eval."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gapfx.capture.facts import Capture
from gapfx.capture.leaves import is_script
from gapfx.capture.record import capture
from gapfx.capture.state import restored


def capture_eval(model: nn.Module, run: Callable[[nn.Module], object]) -> Capture:
    """As `capture`, with all modules in eval; afterwards the training flag of each is as before.

    Gradients are recorded as `run` has them: under `torch.no_grad()` a model may take other paths.
    """
    scripts = [(module, module.training) for module in model.modules() if is_script(module)]
    with restored(model):
        try:
            return capture(model.eval(), run)
        finally:
            for module, was_training in scripts:
                module.training = was_training
