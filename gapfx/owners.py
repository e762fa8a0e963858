"""Owners: the modules that hold weights, the fx graph of each, and how a rewritten graph takes effect.

The module tree stays in charge: an owner's rewritten graph becomes the forward, or the attribute reads, of a dynamic
subclass of its class. So every op put into it runs inside the owner's forward, where ZeRO and FSDP have the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from gapfx.capture import Capture, EvalReads
from gapfx.capture.late_code import LateGraphModule
from gapfx.capture.leaves import is_script
from gapfx.forms import BOOKKEEPING, exact_trace
from gapfx.plan import Form

# Parents that read the weights of their children: in every forward, or in the fast path of evaluation, which they take
# or not by the batch (its padding, its dtype, a nested tensor), so that one forward in eval does not say.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)
NOTHING_READ = EvalReads()


@dataclass(frozen=True)
class Owner:
    """A module that holds weights, and the graph in which rewrites edit how they are used.

    Form "forward": `graph` is the module's own forward. Form "read": `graph` holds the reads alone, its output is a
    dict from parameter name to value; `reason` says why. Form "in-place": the same graph, for a module whose reads
    cannot be changed: what it does to a weight is done to the parameter itself. `names` are the weights in the module.
    """

    fqn: str
    module: nn.Module
    names: tuple[str, ...]
    graph: LateGraphModule
    form: Form
    reason: str = ""

    def parameter(self, name: str) -> nn.Parameter:
        """The stored parameter, also where reading the attribute gives the masked weight."""
        return vars(self.module)["_parameters"][name]

    def read(self, name: str) -> fx.Node | None:
        """The get_attr node of an attribute in the graph."""
        return next((node for node in self.graph.graph.find_nodes(op="get_attr", target=name)), None)


def holders(capture: Capture) -> Iterator[tuple[str, str, str]]:
    """(weight, FQN of a module that holds it, name in that module), each module once under its first FQN.

    A tied weight comes once for every module that holds it.
    """
    first = _first_fqns(capture.model)
    for parameter in capture.parameters.values():
        seen: set[tuple[str, str]] = set()
        for fqn in (parameter.fqn, *parameter.aliases):
            path, _, name = fqn.rpartition(".")
            place = (first[path], name)
            if place not in seen:
                seen.add(place)
                yield (parameter.fqn, *place)


def _first_fqns(model: nn.Module) -> dict[str, str]:
    """Every FQN of a module -> its first one."""
    first: dict[int, str] = {}
    named = model.named_modules(remove_duplicate=False)
    return {fqn: first.setdefault(id(module), fqn) for fqn, module in named}


def build_owners(capture: Capture, in_eval: EvalReads = NOTHING_READ) -> dict[str, Owner]:
    """FQN -> owner, for each module that holds a weight of a matrix product, a convolution or an embedding.

    `in_eval` are reads of the forward in eval, which the capture of train does not have.
    """
    names: dict[str, list[str]] = {}
    outside: dict[str, str] = {}
    foreign = _foreign_users(capture)
    for weight, path, name in holders(capture):
        stored: object = vars(capture.model.get_submodule(path))["_parameters"][name]
        if capture.parameters[weight].role in ("gemm", "embedding") and isinstance(stored, nn.Parameter):
            names.setdefault(path, []).append(name)
            if weight in foreign:
                outside[path] = f"{name} is read from outside, by {foreign[weight]}"
            elif weight in in_eval.foreign:
                reader = in_eval.foreign[weight] or "the root"
                outside.setdefault(path, f"{name} is read from outside in eval, by {reader}")
    traces: dict[tuple[Any, ...], fx.Graph | str] = {}
    model = capture.model
    return {path: _build(model, path, tuple(own), outside.get(path, ""), traces) for path, own in names.items()}


def _foreign_users(capture: Capture) -> dict[str, str]:
    """Weight -> the first module that uses it without holding it."""
    first = _first_fqns(capture.model)
    homes: dict[str, set[str]] = {}
    for weight, path, _ in holders(capture):
        homes.setdefault(weight, set()).add(path)
    found: dict[str, str] = {}
    for use in capture.uses:
        user = first[use.user]
        if user not in homes[use.fqn]:
            found.setdefault(use.fqn, use.user or "the root")
    return found


def _build(
    model: nn.Module, path: str, names: tuple[str, ...], outside: str, traces: dict[tuple[Any, ...], fx.Graph | str]
) -> Owner:
    module = model.get_submodule(path)
    if is_script(module):
        reason = f"{path} is a ScriptModule: it runs outside of Python"
        return _with_shapes(Owner(path, module, names, _reads(module, names), "in-place", reason))
    traced = _read_by_parent(model, path) or outside or _trace(module, names, traces)
    if isinstance(traced, str):
        return _with_shapes(Owner(path, module, names, _reads(module, names), "read", traced))
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    return _with_shapes(Owner(path, module, names, LateGraphModule(module, graph, type(module).__name__), "forward"))


def _trace(module: nn.Module, names: tuple[str, ...], traces: dict[tuple[Any, ...], fx.Graph | str]) -> fx.Graph | str:
    """As `exact_trace`; layers of one class with equal settings are traced once."""
    if "forward" in vars(module) or vars(module)["_modules"]:
        return exact_trace(module, names)
    settings = sorted((name, _setting(value)) for name, value in vars(module).items() if name not in BOOKKEEPING)
    stored = vars(module)["_parameters"] | vars(module)["_buffers"]
    absent = [name for name, tensor in stored.items() if tensor is None]
    key = (type(module), names, *settings, *absent)
    if key not in traces:
        traces[key] = exact_trace(module, names)
    return traces[key]


def _setting(value: object) -> str:
    """Equal for equal plain values; other objects are equal to themselves alone."""
    return repr(value) if isinstance(value, (bool, int, float, str, tuple, list, type(None))) else str(id(value))


def _with_shapes(owner: Owner) -> Owner:
    for node in owner.graph.graph.find_nodes(op="get_attr"):
        node.meta["shape"] = tuple(getattr(owner.graph, str(node.target)).shape)
    return owner


def _read_by_parent(model: nn.Module, path: str) -> str:
    found, module, parts = "", model, path.split(".") if path else []
    for depth, part in enumerate(parts):
        if isinstance(module, READERS):
            above = ".".join(parts[:depth])
            found = f"{above or 'the root'} ({type(module).__name__}) can read its weights directly"
        module = getattr(module, part)  # a ScriptModule has no get_submodule
    return found


def _reads(module: nn.Module, names: tuple[str, ...]) -> LateGraphModule:
    graph = fx.Graph()
    held = nn.Module()
    for name in names:
        held.register_parameter(name, vars(module)["_parameters"][name])
    graph.output({name: graph.get_attr(name) for name in names})
    return LateGraphModule(held, graph, type(module).__name__)


def in_reads(owner: Owner, form: Form, reason: str) -> Owner:
    """The same owner in a form whose graph holds the reads alone, without any rewrite."""
    graph = _reads(owner.module, owner.names)
    return _with_shapes(dataclasses.replace(owner, graph=graph, form=form, reason=reason))
