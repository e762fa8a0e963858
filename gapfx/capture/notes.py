"""What a recording cannot promise, in human words with the module named."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from gapfx.capture.facts import Use
from gapfx.capture.nodes import fn_of, inside_of
from gapfx.capture.patches import Watch

MAX_NAMES = 4
TRANSFORM_NAMES = {"vmap_impl": "vmap", "grad_impl": "grad", "grad_and_value_impl": "grad_and_value"}


def find_notes(model: nn.Module, watch: Watch, uses: tuple[Use, ...]) -> tuple[str, ...]:
    """All notes of a recording, in a stable order."""
    return (
        *_device_notes(model),
        *_call_notes(watch),
        *_inside_notes(watch, uses),
        *_unreached_notes(uses),
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


def _inside_notes(watch: Watch, uses: tuple[Use, ...]) -> Iterator[str]:
    """Weights that calls use where Python shows no op, and those of which nothing is seen there."""
    hosts = {node.name: node for node in watch.recorder.graph.nodes if inside_of(node) is not None}
    taken: dict[tuple[str, str], dict[str, None]] = {}
    for use in uses:
        if use.node not in hosts or not (use.role == "gemm" or use.reason.startswith("read inside")):
            continue
        found = (
            f"as an operand of {use.fn}, seen by the ops below it" if use.role == "gemm" else "in code that no op shows"
        )
        taken.setdefault((f"{_name(use.user)}: {_opaque_name(hosts[use.node])}", found), {})[use.fqn] = None
    for (where, found), fqns in taken.items():
        yield f"{where} uses {_some(list(fqns))} {found}"


def _opaque_name(node: fx.Node) -> str:
    """What kind of call a node is, with its name."""
    if node.op == "call_module":
        return "a ScriptModule"
    name = fn_of(node)
    if name in TRANSFORM_NAMES:
        return f"the function transform {TRANSFORM_NAMES[name]}"
    return f"the autograd Function {name}"


def _unreached_notes(uses: tuple[Use, ...]) -> Iterator[str]:
    siblings: dict[str, dict[str, None]] = {}
    for use in uses:
        if use.is_assumed:
            siblings.setdefault(use.node, {})[use.fqn] = None
    fqns = [fqn for group in siblings.values() for fqn in group]
    if fqns:
        yield (
            f"the model: this batch did not come to {len(fqns)} weights ({_some(fqns)}); they are taken because modules"
            " of their class beside them were reached"
        )


def _some(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f", {more} more" if more > 0 else "")


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
