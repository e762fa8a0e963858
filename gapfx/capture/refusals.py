"""What cannot be captured, each with its reason."""

from __future__ import annotations

import os
import traceback

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gapfx.capture.leaves import is_script
from gapfx.capture.patches import Watch
from gapfx.capture.values import tensors_in
from gapfx.errors import CaptureError, GapfxError

RECORDING = frozenset(
    {"add_inputs", "add_output", "add_function", "add_leaf", "add_inside", "add_op"}
    | {"enter_autocast", "exit_autocast"}
)


def refuse_model(model: nn.Module) -> None:
    """Raise CaptureError for a model whose forward shows nothing, or whose weights are not there."""
    kind = type(model).__name__
    if is_script(model):
        raise CaptureError(
            f"the model is a ScriptModule ({kind}): it runs outside of Python",
            fix="return the Python module from model(), before torch.jit.script or trace",
        )
    if isinstance(model, nn.DataParallel):
        raise CaptureError(
            "the model is wrapped in DataParallel, which copies its modules", fix="return the plain model"
        )
    for fqn, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise CaptureError(
                f"the parameter {fqn} has no shape yet (a lazy module)",
                fix="run one forward in model() before returning it, or give the sizes",
            )
        if hasattr(parameter, "to_local"):
            raise CaptureError(f"the parameter {fqn} is a DTensor", fix="capture the model before it is sharded")


def refuse_output(model: nn.Module, output: object) -> None:
    """Raise CaptureError unless the model returned a floating point tensor."""
    if not any(t.is_floating_point() or t.is_complex() for t in tensors_in(output)):
        raise CaptureError(
            f"the model returns no floating point tensor ({type(output).__name__}): there is nothing to train",
            where=type(model).__name__,
            fix="return the values that the loss needs",
        )


def failed_forward(model: nn.Module, watch: Watch, error: Exception) -> GapfxError:
    """The error that names the module and the line where the run stopped; its own failures are not the user's."""
    what = f"{type(error).__name__}: {error}"
    if RECORDING & {frame.name for frame in traceback.extract_tb(error.__traceback__)}:
        return GapfxError(
            f"the recorder failed in {watch.recorder.failed_in or 'the root'}{_line(error, ', ')}: {what}"
        )
    if watch.is_done:
        return CaptureError(f"the loss fails after the forward: {what}", where=_line(error))
    if not watch.num_root_calls:
        return CaptureError(f"the loss fails before it calls the model: {what}", where=_line(error))
    meta = [fqn for fqn, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        what = f"{meta[0]} is on the meta device and has no values ({what})"
    fqn = watch.recorder.failed_in
    where = f"{fqn or 'the root'} ({type(model.get_submodule(fqn)).__name__}){_line(error, ', ')}"
    fix = "build the model on a real device, or give inputs on the meta device" if meta else ""
    return CaptureError(f"the forward fails: {what}", where=where, fix=fix)


def _line(error: Exception, prefix: str = "") -> str:
    """File and line of the innermost frame that is neither torch's nor the recorder's."""
    hidden = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(hidden)]
    return f"{prefix}{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
