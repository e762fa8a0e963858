"""The task's optimizer: made for the parameters of an engine, and refused where it would need weights whole."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from gapfx.errors import UserError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_SHAPE, _PARTS, _STEPS = (6, 4), (10, 13, 1), 3
_EVERY = 5  # of the elements every so many is 0, with no gradient


def make_optimizer(factory: OptimizerFactory, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """What the task's function returns for the parameters.

    One that stage 3 has cut is shown in its shape, by a stand-in without memory: a function may sort by dimensions.
    Raises UserError when the function returns no optimizer.
    """
    shown = [_stand_in(parameter) if hasattr(parameter, "ds_shape") else parameter for parameter in parameters]
    made = cast(object, factory(list(shown)))
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(f"optimizer(params) returned a {type(made).__name__}", fix="return a torch.optim.Optimizer")
    real = {id(stand_in): parameter for stand_in, parameter in zip(shown, parameters, strict=True)}
    for group in made.param_groups:
        group["params"] = [real.get(id(parameter), parameter) for parameter in group["params"]]
    return made


def check_optimizer(optimizer: torch.optim.Optimizer, *, in_parts: bool) -> None:
    """Raise UserError for an optimizer with which a sparse training would go wrong: it is tried on a small weight.

    Elements that are 0 and have no gradient must stay 0 (Muon moves them), and its state must be numbers, or tensors of
    the weight's shape, of which a checkpoint can hold slices (Adafactor's are rows and columns). `in_parts`: it will
    see live values as columns, or ZeRO's shares, where one that takes norms of weights too (LAMB, LARS) would train
    another model without a word.
    """
    for group in optimizer.param_groups:
        problem = _problem(optimizer, group, in_parts)
        if problem:
            fix = _FIX_PARTS if problem == _NEEDS_WHOLE else _FIX
            raise UserError(f"the optimizer {type(optimizer).__name__} {problem}", fix=fix)


_FIX = "return an optimizer that updates every element by its own gradients, such as AdamW or SGD"
_NEEDS_WHOLE = (
    "updates an element by more than its own gradients, and parts of weights are all that it would see: "
    "live values, or ZeRO's shares"
)
_FIX_PARTS = f"{_FIX}, or train whole weights with --form masked --zero 0"


def _problem(optimizer: torch.optim.Optimizer, group: dict[str, Any], in_parts: bool) -> str:
    try:
        whole, state = _tried(optimizer, group, [_SHAPE])
        parts, _ = _tried(optimizer, group, [(n, 1) for n in _PARTS]) if in_parts else (whole, {})
    except Exception as error:
        return "fails on a small weight: " + f"{type(error).__name__}: {error}".splitlines()[0]
    odd = [key for key, value in state.items() if isinstance(value, Tensor) and value.numel() not in (1, whole.numel())]
    if bool(whole[::_EVERY].any()):
        return "moves elements that are 0 and have no gradient: pruned weights would not stay 0"
    if odd:
        return f"keeps {odd[0]} in the shape {list(state[odd[0]].shape)} for a weight of {list(_SHAPE)}"
    change = (whole - _numbers(0, whole.device)).abs().max()
    if not bool((whole - parts).abs().max() <= 1e-5 * change):
        return _NEEDS_WHOLE
    return ""


def _stand_in(parameter: Any) -> nn.Parameter:
    shape = tuple(parameter.ds_shape)
    return nn.Parameter(parameter.detach().new_zeros(()).expand(shape), requires_grad=parameter.requires_grad)


def _tried(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, dict[str, Any]]:
    """Flat values of a weight, held in `shapes`, after steps by the rules of the group; state of the first part."""
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    parts = [nn.Parameter(part.view(s)) for part, s in zip(_split(_numbers(0, device), shapes), shapes, strict=True)]
    rules = {**group, "params": parts, "lr": group["lr"] if float(group["lr"]) else 1e-2}
    twin = _twin(optimizer, rules)
    for step in range(_STEPS):
        for part, grad in zip(parts, _split(_numbers(step + 1, device), shapes), strict=True):
            part.grad = grad.view(part.shape).clone()
        twin.step()
    return torch.cat([part.detach().flatten() for part in parts]), dict(twin.state.get(parts[0], {}))


def _twin(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Any:
    """An optimizer of the same kind for one group alone, with no state."""
    if optimizer.state:  # made at once, so a step counts on it
        return cast(Any, type(optimizer))([group], **optimizer.defaults)
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update(vars(optimizer))
    vars(twin).pop("step", None)  # a scheduler's, bound to the other one
    vars(twin).update(state=defaultdict(dict), param_groups=[group])
    vars(twin).update(_optimizer_step_pre_hooks=OrderedDict(), _optimizer_step_post_hooks=OrderedDict())
    return twin


def _numbers(seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(_SHAPE[0] * _SHAPE[1], generator=generator)
    numbers[::_EVERY] = 0
    return numbers.to(device)


def _split(flat: Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    return flat.clone().split([rows * columns for rows, columns in shapes])
