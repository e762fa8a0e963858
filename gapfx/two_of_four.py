"""2:4 weights on CUDA: torch's semi-structured format (cuSPARSELt, else CUTLASS), and why a weight cannot have it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from gapfx.plan import Weight

PATTERN = "2:4"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_CAPABILITY = (8, 0)
# What both of torch's back ends take in 16 bits.
ROWS, COLUMNS = 32, 64


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def device_refusal(capability: tuple[int, int]) -> str:
    """Why a device has no 2:4 products; "" when it has."""
    if capability >= LEAST_CAPABILITY:
        return ""
    found, needed = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
    return f"2:4 needs compute capability {needed}, this device has {found}"


def shape_refusal(shape: tuple[int, ...]) -> str:
    """Why the format does not take a weight; "" when it does."""
    if len(shape) != 2:
        return "2:4 is for linear layers alone"
    if shape[0] % ROWS or shape[1] % COLUMNS:
        return f"2:4 takes multiples of {ROWS} outputs and {COLUMNS} inputs"
    return ""


def packed(weight: Tensor) -> Tensor:
    """The format of a 2:4 weight on CUDA. Raises what torch raises where it cannot."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        return to_sparse_semi_structured(weight)


def serve(module: nn.Module, weights: Iterable[Weight], capability: tuple[int, int]) -> dict[str, str]:
    """Put the 2:4 weights of a module's linear layers into the format; FQN of each weight -> why it stays dense, or "".

    The module is on CUDA and has the weights' zeros.
    """
    return {weight.fqn: _serve(module, weight, capability) for weight in weights}


def _serve(module: nn.Module, weight: Weight, capability: tuple[int, int]) -> str:
    home, _, name = weight.fqn.rpartition(".")
    owner = module.get_submodule(home)
    reason = _refusal(owner, name, weight) or device_refusal(capability)
    if reason:
        return reason
    try:
        made = packed(getattr(owner, name).detach())
    except (RuntimeError, AssertionError) as error:  # of a build of torch without the kernels
        return f"torch refuses it: {error}".splitlines()[0][:120]
    setattr(owner, name, nn.Parameter(made, requires_grad=False))
    return ""


def _refusal(owner: nn.Module, name: str, weight: Weight) -> str:
    if weight.pattern != PATTERN:
        return f"on CUDA the pattern {PATTERN} alone has faster products, this one is {weight.pattern}"
    if type(owner) is not nn.Linear or weight.aliases:
        return "2:4 is for linear layers that share no weight"
    if getattr(owner, name).dtype not in DTYPES.values():
        return '2:4 takes bf16 and fp16: load with values="bf16"'
    return shape_refusal(weight.shape)
