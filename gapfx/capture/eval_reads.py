"""Who reads which weight in the forward of eval; far cheaper than a recording, which costs as much as that of train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gapfx.capture.leaves import is_script
from gapfx.capture.record import eager
from gapfx.capture.state import restored


@dataclass(frozen=True)
class EvalReads:
    """Weight -> FQN of a module that reads it in eval without holding it ("" = the root).

    `failure` is the error of a model that does not run in eval; nothing is known of its reads then.
    """

    foreign: Mapping[str, str] = field(default_factory=dict[str, str])
    failure: str = ""


def eval_reads(model: nn.Module, run: Callable[[nn.Module], object]) -> EvalReads:
    """The foreign reads of one `run(model)` in eval without gradients; the model and random states stay as they are.

    Ops are watched below autograd, where the one op of torch's fast path for Transformer layers shows too.
    """
    scripts = [(module, module.training) for module in model.modules() if is_script(module)]
    watch = _Watch(model)
    with restored(model), eager(), torch.no_grad():
        hooks = (
            register_module_forward_pre_hook(lambda module, args: watch.scope.append(module)),
            register_module_forward_hook(watch.leave, always_call=True),
        )
        try:
            model.eval()
            with watch:
                run(model)
        except Exception as error:
            return EvalReads(failure=f"{type(error).__name__}: {error}".splitlines()[0])
        finally:
            for hook in hooks:
                hook.remove()
            for module, was_training in scripts:
                module.training = was_training
    names = {id(module): fqn for fqn, module in reversed(list(model.named_modules()))}
    return EvalReads({fqn: names.get(id(reader), "") for fqn, reader in watch.foreign.items()})


class _Watch(TorchDispatchMode):
    """Sees the parameters that ops take, and the innermost module whose forward runs meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scope = [model]
        self.foreign: dict[str, nn.Module] = {}
        self._names = {id(parameter): fqn for fqn, parameter in model.named_parameters()}
        self._holders: dict[int, set[int]] = {}
        for module in model.modules():
            for parameter in cast(Mapping[str, Tensor | None], vars(module)["_parameters"]).values():
                self._holders.setdefault(id(parameter), set()).add(id(module))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to do so imports dynamo, which takes a second; nothing compiles meanwhile

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward of the innermost module is over."""
        self.scope.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in _flat((*args, *(kwargs or {}).values())):
            holders = self._holders.get(id(value))
            if holders and id(self.scope[-1]) not in holders and id(value) in self._names:
                self.foreign.setdefault(self._names[id(value)], self.scope[-1])
        return func(*args, **(kwargs or {}))


def _flat(values: Iterable[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from cast(Iterable[object], value)
        else:
            yield value
