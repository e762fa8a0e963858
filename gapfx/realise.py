"""Makes rewritten owners take effect in the model: one dynamic subclass for each distinct graph."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn

from gapfx.capture.late_code import LateGraphModule, generated_forward
from gapfx.in_place import mask_in_place
from gapfx.masks import MASK_PREFIX, mask_home
from gapfx.owners import Owner
from gapfx.plan import Form, OwnerForm
from gapfx.rows import Row, graph_of, identity, rows_of

# (class, form, names, rows) -> subclass: equal layers share one, so torch.compile guards on few types.
_SUBCLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}
_BASE = "_gapfx_base"


def realise_owners(model: nn.Module, owners: Iterable[Owner]) -> None:
    """Install the graph of each owner in `model` that has masks, undo the others; objects and FQNs stay the same."""
    in_place: list[str] = []
    for owner in owners:
        bits = {name: buffer for name, buffer in owner.graph.named_buffers() if name.startswith(MASK_PREFIX)}
        for name in owner.names:
            _hold_bits(model, _fqn(owner, name), bits.get(MASK_PREFIX + name))
        is_subclass = bool(bits) and owner.form != "in-place"
        _set_class(owner.module, _subclass(owner) if is_subclass else base_of(owner.module))
        if owner.form == "in-place":
            in_place += [_fqn(owner, name.removeprefix(MASK_PREFIX)) for name in bits]
    mask_in_place(model, tuple(in_place))


def is_masked(owner: Owner) -> bool:
    """Whether its graph masks a weight."""
    return any(name.startswith(MASK_PREFIX) for name, _ in owner.graph.named_buffers())


def owner_forms(owners: Mapping[str, Owner]) -> tuple[OwnerForm, ...]:
    """How each owner that has a masked weight is masked, in order."""
    return tuple(
        OwnerForm(fqn, base_of(owner.module).__name__, owner.form, owner.reason)
        for fqn, owner in owners.items()
        if is_masked(owner)
    )


@contextmanager
def set_aside(owners: Iterable[Owner]) -> Generator[None]:
    """Meanwhile the owners in form forward or read run their own code on their stored weights."""
    modules = [owner.module for owner in owners if base_of(owner.module) is not type(owner.module)]
    classes = [type(module) for module in modules]
    try:
        for module in modules:
            _set_class(module, base_of(module))
        yield
    finally:
        for module, cls in zip(modules, classes, strict=True):
            _set_class(module, cls)


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class of the module without masks."""
    return getattr(type(module), _BASE, type(module))


def _fqn(owner: Owner, name: str) -> str:
    return f"{owner.fqn}.{name}" if owner.fqn else name


def _hold_bits(model: nn.Module, fqn: str, bits: Tensor | None) -> None:
    home, name = mask_home(model, fqn)
    is_held = name in vars(home)["_buffers"]
    if bits is None and is_held:
        delattr(home, name)
    elif bits is not None and not is_held:
        home.register_buffer(name, bits.clone(), persistent=False)


def _set_class(module: nn.Module, target: type[nn.Module]) -> None:
    base = base_of(module)
    # A wrapper such as FSDP2 may have put its own subclass on top of the one that is asked for.
    if type(module) is target or (target is not base and isinstance(module, target)):
        return
    if isinstance(module, nn.RNNBase):
        vars(module).pop("_flat_weights", None)  # raw tensors; the subclass reads the masked ones
    cast(Any, module).__class__ = target
    if isinstance(module, nn.RNNBase) and target is base:
        cast(Any, module)._init_flat_weights()


@dataclass(frozen=True)
class _Recipe:
    """What makes a subclass; a masked module is pickled with it, since pickle finds no class that was made here."""

    base: type[nn.Module]
    form: Form
    names: tuple[str, ...]
    rows: tuple[Row, ...]

    def subclass(self) -> type[nn.Module]:
        """The class of modules that are masked so."""
        key = (self.base, self.form, self.names, identity(self.rows))
        if key not in _SUBCLASSES:
            _SUBCLASSES[key] = self._make()
        return _SUBCLASSES[key]

    def new(self) -> nn.Module:
        """A module without state, for unpickling."""
        cls = self.subclass()
        return cls.__new__(cls)

    def _make(self) -> type[nn.Module]:
        base, graph = self.base, graph_of(self.rows)
        body: dict[str, Any] = {_BASE: base, "__module__": base.__module__, "__qualname__": base.__qualname__}
        body |= {"__doc__": base.__doc__, "__reduce_ex__": _reducer(self)}
        body |= _forward(graph) if self.form == "forward" else _properties(base, graph)
        return type(base.__name__, (base,), body)


def _subclass(owner: Owner) -> type[nn.Module]:
    return _Recipe(base_of(owner.module), owner.form, owner.names, rows_of(owner.graph.graph)).subclass()


def _reducer(recipe: _Recipe) -> Callable[[nn.Module, int], Any]:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        make, args, *state = cast(Any, recipe.base).__reduce_ex__(self, max(2, protocol))
        is_plain = make is copyreg.__newobj__ and args == (recipe.subclass(),)  # pyright: ignore[reportAttributeAccessIssue]
        return (recipe.new, (), *state) if is_plain else (make, args, *state)

    return reduce


def _forward(graph: fx.Graph) -> dict[str, Any]:
    held = nn.Module()
    for node in graph.find_nodes(op="get_attr"):
        held.register_parameter(str(node.target), None)
    return {"forward": generated_forward(LateGraphModule(held, graph))}


def _properties(base: type[nn.Module], graph: fx.Graph) -> dict[str, Any]:
    values = cast(Mapping[str, fx.Node], graph.output_node().args[0])
    body: dict[str, Any] = {name: _property(name, value) for name, value in values.items() if value.op != "get_attr"}
    if issubclass(base, nn.RNNBase):
        body |= _RNN
    return body


def _property(name: str, value: fx.Node) -> property:
    """A read of parameter `name` that runs the graph up to `value` on the module's own tensors."""
    compute, sources = _read_function(value)

    def read(self: Any) -> Tensor:
        weight: Tensor = self._parameters[name]
        held = [self._parameters[key] if key in self._parameters else self._buffers[key] for key in sources]
        if hasattr(weight, "to_local") or any(tensor.numel() == 0 for tensor in held):
            # ZeRO-3 and FSDP2 take the weight away outside the forward, where models still ask for its dtype; and
            # recurrent layers ask for it while they are copied without their masks.
            return weight
        return compute(*held)

    return property(read)


def _read_function(value: fx.Node) -> tuple[Callable[..., Tensor], tuple[str, ...]]:
    """The graph that leads to `value` as a function, and the attributes that are its arguments."""
    needed, todo = set[fx.Node](), [value]
    while todo:
        node = todo.pop()
        needed.add(node)
        todo += node.all_input_nodes
    graph, copies, sources = fx.Graph(), dict[fx.Node, fx.Node](), list[str]()
    for node in value.graph.nodes:
        if node in needed and node.op == "get_attr":
            sources.append(str(node.target))
            copies[node] = graph.placeholder(f"source_{len(sources)}")  # a ParameterList calls its own "0"
        elif node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[value])
    forward = type(fx.GraphModule(nn.Module(), graph)).forward
    return functools.partial(forward, None), tuple(sources)


class _Unmasked:
    """An RNN for its own input check, which asks for the dtype of a weight: that needs no mask."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _check_input(self: Any, input: Tensor, batch_sizes: Tensor | None) -> None:
    nn.RNNBase.check_input(cast(Any, _Unmasked(self)), input, batch_sizes)


def _flat_weights(self: Any) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self: Any, value: object = None) -> None:
    """Masked weights are made in each forward: there is nothing to cache and nothing to flatten."""


_RNN: dict[str, Any] = {
    "_flat_weights": property(_flat_weights, _ignore),
    "_update_flat_weights": _ignore,
    "flatten_parameters": _ignore,
    "check_input": _check_input,
}
