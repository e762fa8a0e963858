"""Which modules are one node of the graph, and what they are called there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
WITH_CHILDREN = (nn.MultiheadAttention,)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_script(module: nn.Module) -> bool:
    """Whether the module runs outside of Python, where nothing can be recorded."""
    return isinstance(module, torch.jit.ScriptModule)


def is_leaf(module: nn.Module, known: set[int]) -> bool:
    """Whether a call of the module is one node: torch's own forward on its own parameters and nothing else.

    Hooks, tensors set as plain attributes (old weight norm) and parameters that are swapped for a call
    (`functional_call`) make a module transparent: its forward is then recorded op by op. `known` holds the ids of the
    model's parameters.
    """
    if is_script(module):
        return True
    forward = getattr(type(module), "forward", None)
    if isinstance(module, CONTAINERS) or not str(getattr(forward, "__module__", "")).startswith("torch.nn.modules"):
        return False
    if vars(module)["_modules"] and not isinstance(module, WITH_CHILDREN):
        return False
    return all(_is_own(vars(part), known) for part in (module.modules() if vars(module)["_modules"] else (module,)))


def _is_own(attributes: Mapping[str, Any], known: set[int]) -> bool:
    parameters = (parameter for parameter in attributes["_parameters"].values() if parameter is not None)
    return (
        not any(attributes[hooks] for hooks in HOOKS)
        and not any(isinstance(value, torch.Tensor) for value in attributes.values())
        and all(id(parameter) in known for parameter in parameters)
    )


def module_fn(module: nn.Module) -> str:
    """The op a leaf stands for: `linear`, `conv2d`, `layer_norm`, `lstm`, ..."""
    if is_script(module):
        return "script_module"
    cls = next((base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules")), type(module))
    return SPECIAL.get(cls.__name__) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


SPECIAL = {
    "NonDynamicallyQuantizableLinear": "linear",
    "GELU": "gelu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "PReLU": "prelu",
    "LSTMCell": "lstm_cell",
    "GRUCell": "gru_cell",
    "RNNCell": "rnn_cell",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "MultiheadAttention": "multi_head_attention",
    "ConvTranspose1d": "conv_transpose1d",
    "ConvTranspose2d": "conv_transpose2d",
    "ConvTranspose3d": "conv_transpose3d",
}
