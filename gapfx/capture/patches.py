"""Watches module calls and autograd Functions while the forward runs, and always takes the patches back."""

from __future__ import annotations

import functools
import inspect
import keyword
import re
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._functorch import apis, eager_transforms
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast, autocast  # pyright: ignore[reportPrivateUsage]
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction  # pyright: ignore[reportPrivateUsage]
from torch.utils.checkpoint import CheckpointFunction

from gapfx.capture.assigned import Buffers, assign_buffer
from gapfx.capture.leaves import is_leaf, is_script
from gapfx.capture.memory import version
from gapfx.capture.recorder import Recorder, input_names

# What torch.vmap and torch.func.grad call in their home module.
TRANSFORMS = ((apis, "vmap_impl"), (eager_transforms, "grad_impl"), (eager_transforms, "grad_and_value_impl"))


class Watch:
    """Routes calls to a recorder from the root's first call to its return; other threads are left alone."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder
        self.num_root_calls = 0
        self.output: Any = None
        self.first_call = ""
        self.unregistered: set[str] = set()
        self._parameters = [(fqn, parameter, version(parameter)) for fqn, parameter in model.named_parameters()]
        self._known = {id(parameter) for _, parameter, _ in self._parameters}
        self._thread = threading.get_ident()
        self._is_recording = False
        self._autocasts: dict[int, fx.Node] = {}

    @property
    def is_done(self) -> bool:
        """Whether the forward was recorded to its end."""
        return self.num_root_calls > 0 and not self._is_recording

    def written_parameters(self) -> list[str]:
        """FQNs of parameters written in place since the watch began."""
        return [fqn for fqn, parameter, was in self._parameters if version(parameter) != was]

    def call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What `module(*args, **kwargs)` does now."""
        if threading.get_ident() != self._thread or self.recorder.is_suspended:
            return original(module, *args, **kwargs)
        if not self._is_recording:
            return self._before(original, module, args, kwargs)
        fqn = self.recorder.module_names.get(id(module))
        if fqn is None:
            if any(True for _ in module.parameters()):
                self.unregistered.add(type(module).__name__)
            return original(module, *args, **kwargs)
        with self.recorder.inside(fqn):
            if not is_leaf(module, self._known):
                return original(module, *args, **kwargs)
            function = functools.partial(original, module)
            if is_script(module):
                return self._script(function, fqn, module, args, kwargs)
            out, written = self.recorder.run(function, args, kwargs)
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                self.recorder.add_leaf(fqn, module, args, kwargs, out, written)
            return out

    def _script(self, function: Callable[..., Any], fqn: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        with recorder.outside():
            out, written, spy = recorder.spy(function, args, kwargs)
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            node = recorder.add_leaf(fqn, module, args, kwargs, out, written)
            recorder.add_inside(node, spy, out)
        return out

    def _before(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not self.model:
            self.first_call = self.first_call or self.recorder.module_names.get(id(module), "")
            return original(module, *args, **kwargs)
        self.num_root_calls += 1
        if self.num_root_calls > 1:
            return original(module, *args, **kwargs)
        return self._root(original, args, kwargs)

    def _root(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._is_recording = True
        with self.recorder.inside(""):
            self.recorder.add_inputs(self._inputs(args, kwargs))
            buffers = Buffers(self.model)
            with self.recorder:
                self.output = original(self.model, *args, **kwargs)
            self._add_assignments(buffers)
            self.recorder.add_output(self.output)
        self._is_recording = False
        return self.output

    def _add_assignments(self, buffers: Buffers) -> None:
        """At the end of the forward: what reads a new tensor in between takes it from the op that made it."""
        for module, name, value in buffers.replaced():
            if not is_leaf(module, self._known):  # a leaf does it itself
                self.recorder.add_function(assign_buffer, (module, name, value), {}, None, set())

    def _inputs(self, args: Any, kwargs: Any) -> list[tuple[str, Tensor]]:
        own, taken = self.recorder.values.names, {"self"}
        found = {id(t): (name, t) for name, t in input_names(_signature(self.model), args, kwargs) if id(t) not in own}
        return [(_identifier(name, taken), tensor) for name, tensor in found.values()]

    def apply(self, original: Callable[..., Any], function: type[Function], args: Any, kwargs: Any) -> Any:
        """What `function.apply(*args)` does now."""
        recorder = self.recorder
        if threading.get_ident() != self._thread or recorder.is_suspended or not self._is_recording:
            return original(*args, **kwargs)
        if function is CheckpointFunction:  # re-entrant: its forward hides the modules, so run it unchecked
            return args[0](*args[2:])
        return self._opaque(function.apply, args, kwargs)

    def transform(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function transform such as vmap does now: its tensors have no life outside, so it is one node."""
        if threading.get_ident() != self._thread or self.recorder.is_suspended or not self._is_recording:
            return original(*args, **kwargs)
        return self._opaque(original, args, kwargs)

    def enter_autocast(self, original: Callable[..., Any], autocast: Any) -> Any:
        """Begin mixed precision, as a node; inside a leaf it is part of the leaf."""
        out = original(autocast)
        if threading.get_ident() == self._thread and self._is_recording and not self.recorder.is_suspended:
            args = (autocast.device, autocast.fast_dtype, autocast._enabled, autocast._cache_enabled)
            self._autocasts[id(autocast)] = self.recorder.add_function(_enter_autocast, args, {}, None, set())
        return out

    def exit_autocast(self, original: Callable[..., Any], autocast: Any, error: Any) -> Any:
        """End mixed precision."""
        entered = self._autocasts.pop(id(autocast), None)
        if entered is not None:
            self.recorder.add_function(_exit_autocast, (entered,), {}, None, set())
        return original(autocast, *error)

    def _opaque(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        recorder = self.recorder
        recorder.opaque_reads = set()
        try:
            out, written, spy = recorder.spy(function, args, kwargs)
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                node = recorder.add_function(function, args, kwargs, out, written)
                recorder.add_inside(node, spy, out)
            node.meta.update(kind="opaque", reads=tuple(sorted(recorder.opaque_reads)))
        finally:
            recorder.opaque_reads = None
        return out


@contextmanager
def watching(watch: Watch) -> Generator[None]:
    """Route every module call and Function of this process through `watch`."""
    call = nn.Module.__dict__["__call__"]
    enter, leave = autocast.__enter__, autocast.__exit__

    def watched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return watch.call(call, self, args, kwargs)

    def watched_apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        original = cast(Any, super(_SingleLevelFunction, cls)).apply
        return watch.apply(original, cls, args, kwargs)

    with ExitStack() as undo:
        _patch(undo, nn.Module, "__call__", watched_call)
        # Where Function.apply goes on: a model may have stored the method itself before.
        undo.callback(delattr, _SingleLevelFunction, "apply")
        setattr(_SingleLevelFunction, "apply", classmethod(watched_apply))  # noqa: B010
        _patch(undo, autocast, "__enter__", lambda self: watch.enter_autocast(enter, self))
        _patch(undo, autocast, "__exit__", lambda self, *error: watch.exit_autocast(leave, self, error))
        for home, name in TRANSFORMS:
            original = getattr(home, name, None)
            if original is not None:
                _patch(undo, home, name, _watched_transform(watch, original))
        yield


def _watched_transform(watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return watch.transform(original, args, kwargs)

    return watched


def _patch(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    undo.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _signature(model: nn.Module) -> Sequence[str]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _identifier(name: str, taken: set[str]) -> str:
    name = re.sub(r"\W", "_", name, flags=re.ASCII) or "input"
    name = f"_{name}" if name[0].isdigit() else f"{name}_" if keyword.iskeyword(name) else name
    while name in taken:
        name += "_"
    taken.add(name)
    return name
