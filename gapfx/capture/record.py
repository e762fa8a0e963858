"""`capture`: runs the forward under the recorder and gathers what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, fx, nn

from gapfx.capture.facts import Capture
from gapfx.capture.late_code import LateGraphModule, spell_keywords
from gapfx.capture.notes import find_notes
from gapfx.capture.patches import Watch, watching
from gapfx.capture.recorder import Recorder
from gapfx.capture.refusals import failed_forward, refuse_model, refuse_output
from gapfx.capture.state import collector_paused, restored
from gapfx.capture.unreached import with_unreached
from gapfx.capture.uses import find_uses, parameter_facts
from gapfx.capture.values import safe_target
from gapfx.errors import CaptureError, GapfxError


@collector_paused()
def capture(model: nn.Module, run: Callable[[nn.Module], object]) -> Capture:
    """The recording of the first call of `model` that `run(model)` makes, from its call to its return.

    The forward really runs, once. Afterwards random states, buffers and module attributes are as before. Raises
    CaptureError, with the reason and the module, for what cannot be recorded.
    """
    refuse_model(model)
    recorder = Recorder(model)
    watch = Watch(model, recorder)
    with restored(model), eager(), watching(watch):
        try:
            run(model)
        except GapfxError:
            raise
        except Exception as error:
            raise failed_forward(model, watch, error) from error
    _check_called(watch)
    refuse_output(model, watch.output)
    uses = with_unreached(model, find_uses(recorder.graph, model))
    return Capture(
        graph_module=_graph_module(model, recorder),
        model=model,
        parameters=parameter_facts(model, uses),
        uses=uses,
        notes=find_notes(model, watch, uses),
    )


@contextmanager
def eager() -> Generator[None]:
    """Functions under torch.compile run as plain Python, so that their ops are seen."""
    # Importing dynamo costs a second; where nothing has, nothing is compiled.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


def _check_called(watch: Watch) -> None:
    if watch.num_root_calls:
        return
    instead = f", only its module {watch.first_call!r}" if watch.first_call else ""
    raise CaptureError(
        f"the loss never calls the model itself{instead}",
        where=f"loss(model, batch) with a {type(watch.model).__name__}",
        fix="call model(...) in the loss; move what it does around the forward into the model",
    )


def _graph_module(model: nn.Module, recorder: Recorder) -> fx.GraphModule:
    """The graph with the model's own modules, parameters and buffers under their FQNs."""
    gm = LateGraphModule(nn.Module(), fx.Graph(), class_name="Recorded")
    for table in ("_modules", "_parameters", "_buffers"):
        vars(gm)[table].update({safe_target(fqn): entry for fqn, entry in vars(model)[table].items()})
    for name, box in recorder.values.boxes.items():
        gm.add_module(name, box)
    for name, constant in recorder.values.constants.items():
        _add_constant(gm, name, constant)
    spell_keywords(recorder.graph)
    gm.graph = recorder.graph
    gm.training = model.training
    return gm


def _add_constant(gm: fx.GraphModule, name: str, constant: Tensor) -> None:
    if isinstance(constant, nn.Parameter):
        gm.register_parameter(name, constant)
    else:
        gm.register_buffer(name, constant, persistent=False)
