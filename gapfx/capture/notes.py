"""What a recording cannot promise, in human words with the module named."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from gapfx.capture.facts import Use
from gapfx.capture.patches import Watch


def find_notes(model: nn.Module, watch: Watch, uses: tuple[Use, ...]) -> tuple[str, ...]:
    """All notes of a recording, in a stable order."""
    return (
        *_device_notes(model),
        *_call_notes(watch),
        *_opaque_notes(model, watch, uses),
        *_write_notes(watch),
        *_constant_notes(watch),
        *_data_notes(watch),
    )


def _name(fqn: str) -> str:
    return fqn or "the root"


def _device_notes(model: nn.Module) -> Iterator[str]:
    if any(parameter.is_meta for parameter in model.parameters()):
        yield "the model: parameters are on the meta device, only shapes were recorded"


def _call_notes(watch: Watch) -> Iterator[str]:
    if watch.num_root_calls > 1:
        yield f"the model: called {watch.num_root_calls} times by the loss, only the first call was recorded"
    for name in sorted(watch.unregistered):
        yield f"a module of class {name} is called but not registered in the model: its weights stay dense"


def _opaque_notes(model: nn.Module, watch: Watch, uses: tuple[Use, ...]) -> Iterator[str]:
    kinds = {node.name: node.meta.get("kind") for node in watch.recorder.graph.nodes}
    matrices = {fqn for fqn, parameter in model.named_parameters() if parameter.ndim > 1}
    taken: dict[str, dict[str, None]] = {}
    for use in uses:
        why = f"{_name(use.user)}: {{}} goes into {use.fn}, which cannot be looked into"
        if use.fn == "script_module":
            why = f"{use.user}: {{}} belongs to a ScriptModule, which cannot be looked into"
        elif kinds.get(use.node) != "opaque":
            continue
        if use.fqn in matrices:
            taken.setdefault(why, {})[use.fqn] = None
    for why, fqns in taken.items():
        yield why.format(", ".join(fqns))


def _write_notes(watch: Watch) -> Iterator[str]:
    for fqn in watch.written_parameters():
        yield f"the model: its forward writes into the parameter {fqn} in place; the value stays as written"


def _constant_notes(watch: Watch) -> Iterator[str]:
    modules: dict[str, int] = {}
    for node in watch.recorder.graph.nodes:
        if node.meta.get("kind") == "constant":
            user = node.meta["stack"][-1][0]
            modules[user] = modules.get(user, 0) + 1
    for user, count in modules.items():
        yield f"{_name(user)}: constants of the graph: {count} tensors that are no input, parameter or buffer"


def _data_notes(watch: Watch) -> Iterator[str]:
    for module, markers in watch.recorder.markers.items():
        ops = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in markers.items())
        yield f"{_name(module)}: the path depends on values ({ops}): the graph is one path of several"
