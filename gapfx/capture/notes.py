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
        *_opaque_notes(watch, uses),
        *_constant_notes(watch),
        *_data_notes(watch),
    )


def _device_notes(model: nn.Module) -> Iterator[str]:
    if any(parameter.is_meta for parameter in model.parameters()):
        yield "the model: parameters are on the meta device, only shapes were recorded"


def _call_notes(watch: Watch) -> Iterator[str]:
    if watch.num_root_calls > 1:
        yield f"the model: called {watch.num_root_calls} times by the loss, only the first call was recorded"
    for name in sorted(watch.unregistered):
        yield f"a module of class {name} is called but not registered in the model: its weights stay dense"


def _opaque_notes(watch: Watch, uses: tuple[Use, ...]) -> Iterator[str]:
    kinds = {node.name: node.meta.get("kind") for node in watch.recorder.graph.nodes}
    for use in dict.fromkeys(uses):
        if use.fn == "script_module":
            yield f"{use.user}: a ScriptModule, which cannot be looked into: {use.fqn} stays dense"
        elif kinds.get(use.node) == "autograd_function":
            yield f"{use.user or 'the root'}: {use.fqn} goes into the custom autograd Function {use.fn}: it stays dense"


def _constant_notes(watch: Watch) -> Iterator[str]:
    modules: dict[str, int] = {}
    for node in watch.recorder.graph.nodes:
        if node.meta.get("kind") == "constant":
            user = node.meta["stack"][-1][0]
            modules[user] = modules.get(user, 0) + 1
    for user, count in modules.items():
        yield f"{user or 'the root'}: constants of the graph: {count} tensors that are no input, parameter or buffer"


def _data_notes(watch: Watch) -> Iterator[str]:
    for module, markers in watch.recorder.markers.items():
        ops = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in markers.items())
        yield f"{module or 'the root'}: the path depends on values ({ops}): the graph is one path of several"
