"""What a recording says: the graph that ran, every parameter, and every read of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

UseRole = Literal["gemm", "embedding", "other"]
ParameterRole = Literal["gemm", "embedding", "other", "unused"]


@dataclass(frozen=True)
class Use:
    """One read of a parameter by the recorded forward.

    `node` names the consumer in the graph, behind views and products that keep zeros where they are; `user` is the
    FQN of the innermost module whose forward consumes it ("" = the root), which for a leaf is the leaf. Role `gemm`:
    the operand, of two or more dimensions, of a matrix product or convolution (never its bias). `reason` says why a
    read of two or more dimensions is role `other`. `is_assumed`: the forward did not come to `user`, a sibling of a
    module that it reached with the same weight; `node` is then the sibling's.
    """

    fqn: str
    node: str
    user: str
    fn: str
    role: UseRole
    reason: str = ""
    is_assumed: bool = False


@dataclass(frozen=True)
class Parameter:
    """Facts of one parameter under its canonical FQN, the first in `named_parameters()`.

    `owner` is the FQN of the module that holds it there; `aliases` are its other FQNs (tied weights). The role is the
    highest of its uses: gemm, embedding, other, unused.
    """

    fqn: str
    shape: tuple[int, ...]
    owner: str
    aliases: tuple[str, ...]
    role: ParameterRole


@dataclass(frozen=True)
class Capture:
    """One recorded forward of `model`.

    `graph_module` takes the tensors among the inputs (see `tensors_in`) and returns the tensor, or the tuple of
    tensors, that the model returned; it shares the modules and parameters of the model. Node meta: "stack" (tuple of
    (module FQN, call number), root first), "shape", "fqn" for reads and calls of modules, "fn", "mem_deps" (names of
    nodes that must run before because of writes in place), "inside" (the ops below a call that Python does not show:
    see `gapfx.capture.inside`). `notes` are human text with the module named.
    """

    graph_module: fx.GraphModule
    model: nn.Module
    parameters: Mapping[str, Parameter]
    uses: tuple[Use, ...]
    notes: tuple[str, ...]
