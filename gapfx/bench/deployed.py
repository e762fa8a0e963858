"""A finished run made ready for timing: dense, and loaded with values in each form in which they can be held."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gapfx.bench.clock import Stopwatch
from gapfx.bench.forwards import Inputs, batch_of, forward_of, inputs_of
from gapfx.kernels import native
from gapfx.kernels.decode import Values
from gapfx.loading import Loaded, ServedWeight, load_dense, load_run

HELD: tuple[Values, ...] = ("fp32", "bf16", "int8")
LOADING = "loading"


@dataclass(frozen=True)
class Call:
    """What a module is given, and how many rows or positions its output has."""

    inputs: Inputs
    positions: int


@dataclass(frozen=True)
class Deployed:
    """A finished run in each form, and its own batch.

    `calls` has how each module with planned weights is called in a forward of that batch, which took `seconds`.
    """

    dense: nn.Module
    loaded: dict[Values, Loaded]
    inputs: Inputs
    calls: dict[str, Call]
    seconds: float

    @property
    def weights(self) -> tuple[ServedWeight, ...]:
        """What serves each planned weight."""
        return self.loaded["fp32"].weights

    @property
    def batch(self) -> int:
        """Samples in the task's batch; 0 where the model takes no tensor."""
        return batch_of(self.inputs)

    def positions(self, weight: ServedWeight, batch: int) -> int:
        """Rows or positions that a weight is used for in a forward of `batch` samples, as far as hooks show it."""
        call, own = self.calls.get(home_of(weight.fqn)), max(1, self.batch)
        return max(1, (call.positions if call else own) * (batch or own) // own)


def home_of(fqn: str) -> str:
    """FQN of the module that holds a parameter."""
    return fqn.rpartition(".")[0]


def deploy(run: Path, watch: Stopwatch) -> Deployed:
    """The run, loaded with values in each form in which they can be held, as far as the time allows.

    Raises UserError as `gapfx.load` does.
    """
    dense, batch_run = load_dense(run)
    loaded: dict[Values, Loaded] = {"fp32": watch.keep(LOADING, lambda: load_run(run))}
    if any(is_sparse_linear(weight) for weight in loaded["fp32"].weights):
        for values in HELD[1:]:
            found = watch.begin(LOADING, partial(load_run, run, values=values))
            if not isinstance(found, str):
                loaded[values] = found
    with torch.no_grad():
        inputs = inputs_of(dense, batch_run)
    calls, seconds = _calls(dense, inputs, {home_of(weight.fqn) for weight in loaded["fp32"].weights})
    return Deployed(dense, loaded, inputs, calls, seconds)


def is_sparse_linear(weight: ServedWeight) -> bool:
    """Whether the values of a weight can be held in fewer bits."""
    return (weight.kernel, weight.use) == ("sparse", "linear")


def _calls(dense: nn.Module, inputs: Inputs, homes: set[str]) -> tuple[dict[str, Call], float]:
    """The first call of each module that takes hooks, which ScriptModules do not, and the seconds of the forward."""
    found: dict[str, Call] = {}

    def keeper(home: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found.setdefault(home, Call((args, kwargs), _positions(module, output)))

        return keep

    modules = {home: dense.get_submodule(home) for home in homes}
    hooks = [
        module.register_forward_hook(keeper(home), with_kwargs=True)
        for home, module in modules.items()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    began = time.monotonic()
    forward_of(dense, inputs)()
    seconds = time.monotonic() - began
    for hook in hooks:
        hook.remove()
    return found, seconds


def _positions(module: nn.Module, output: Any) -> int:
    """All dimensions of the first tensor of the output but that of channels, which convolutions have in front."""
    tensor = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if tensor is None:
        return 1
    weight = getattr(module, "weight", None)
    dims = weight.dim() if isinstance(weight, Tensor) else 2
    return tensor.numel() // max(1, tensor.shape[1 - dims if dims > 2 else -1])


def kernel_of(loaded: Loaded, fqn: str, tokens: int) -> str:
    """What multiplies with a weight; without native kernels all is made dense."""
    return "dense" if native.missing_reason() else loaded.kernel(fqn, tokens)
