"""The task's optimizer: made for the parameters of an engine, and refused where it would need weights whole.

Beside its state of each weight an optimizer may count in its parameter groups (the `k` of a schedule-free AdamW). Such
numbers are part of its state: carried from engine to engine and through checkpoints, gone where the state is reset.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gapfx.errors import UserError

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Numbers = dict[str, tuple[float | int, bool]]  # and whether each is kept as a tensor
COUNTED = "group:"  # before the names of numbers of parameter groups, among those of the state of weights

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


def check_optimizer(optimizer: torch.optim.Optimizer, *, in_parts: bool, in_turns: bool = False) -> None:
    """Raise UserError for an optimizer with which a sparse training would go wrong: it is tried on a small weight.

    Elements that are 0 and have no gradient must stay 0 (Muon moves them), and its state must be numbers, or tensors of
    the weight's shape, of which a checkpoint can hold slices (Adafactor's are rows and columns). `in_parts`: it will
    see live values as columns, or ZeRO's shares, where one that takes norms of weights too (LAMB, LARS) would train
    another model without a word. `in_turns`: it may be called several times a step, which one that counts would count.
    """
    for group in optimizer.param_groups:
        problem, fix = _problem(optimizer, group, in_parts, in_turns)
        if problem:
            raise UserError(f"the optimizer {type(optimizer).__name__} {problem}", fix=fix)


_FIX = "return an optimizer that updates every element by its own gradients, such as AdamW or SGD"
_NEEDS_WHOLE = (
    "updates an element by more than its own gradients, and parts of weights are all that it would see: "
    "live values, or ZeRO's shares"
)
_FIX_PARTS = f"{_FIX}, or train whole weights with --form masked --zero 0"
_FIX_LOST = "keep it in the optimizer's state of a weight, or return another optimizer, such as AdamW or SGD"
_FIX_TURNS = "train with --zero 2, or return an optimizer that counts steps in its state of a weight, such as AdamW"


def _problem(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], in_parts: bool, in_turns: bool
) -> tuple[str, str]:
    """What is wrong and what to do, "" for nothing."""
    try:
        whole = _tried(optimizer, group, [_SHAPE])
        parts = _tried(optimizer, group, [(n, 1) for n in _PARTS]) if in_parts else whole
    except Exception as error:
        return "fails on a small weight: " + f"{type(error).__name__}: {error}".splitlines()[0], _FIX
    if problem := _problem_of_elements(whole):
        return problem, _FIX
    if lost := whole.lost():
        return f"changes {lost} in its parameter groups, which is no number: the next phase would lose it", _FIX_LOST
    if in_turns and (count := whole.count()):
        return f"counts {count} in its parameter groups, and stage 3 calls it several times a step", _FIX_TURNS
    change = (whole.values - _numbers(0, whole.values.device)).abs().max()
    is_alike = bool((whole.values - parts.values).abs().max() <= 1e-5 * change)
    return ("", "") if is_alike else (_NEEDS_WHOLE, _FIX_PARTS)


def _problem_of_elements(trial: _Trial) -> str:
    if bool(trial.values[::_EVERY].any()):
        return "moves elements that are 0 and have no gradient: pruned weights would not stay 0"
    sizes = {key: value.numel() for key, value in trial.state.items() if isinstance(value, Tensor)}
    odd = next((key for key, size in sizes.items() if size not in (1, trial.values.numel())), None)
    return f"keeps {odd} in the shape {list(trial.state[odd].shape)} for a weight of {list(_SHAPE)}" if odd else ""


def numbers_in(group: Mapping[str, Any]) -> Numbers:
    """The entries of a parameter group that are one number, but for the learning rate, which gapfx sets."""
    return {
        key: (value.item(), True) if isinstance(value, Tensor) else (value, False)
        for key, value in group.items()
        if key != "lr" and _is_number(value)
    }


def counted(group: Mapping[str, Any], made: Numbers) -> Numbers:
    """Those numbers of a group that are no longer what they were made, or were not there."""
    return {COUNTED + key: value for key, value in numbers_in(group).items() if made.get(key) != value}


def put_counted(group: dict[str, Any], held: Numbers) -> Numbers:
    """Give a group what one like it had counted; the rest of `held`, which is state of weights."""
    for key, (value, is_tensor) in held.items():
        name = key.removeprefix(COUNTED)
        if name != key:
            made = group.get(name)
            like = made if isinstance(made, Tensor) else torch.zeros(())
            group[name] = torch.full_like(like, value) if is_tensor else value
    return {key: value for key, value in held.items() if not key.startswith(COUNTED)}


def _is_number(value: object) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, float | int)


@dataclass(frozen=True)
class _Trial:
    """Steps on a small weight: its flat values, state of its first part, and the group's entries before and after."""

    values: Tensor
    state: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]

    def lost(self) -> str:
        """The first entry of the group that has changed and is no number, "" for none."""
        others = {key: value for key, value in self.after.items() if not _is_number(value)}
        return next((key for key, value in others.items() if repr(value) != repr(self.before.get(key))), "")

    def count(self) -> str:
        """The first number of the group that has changed, "" for none; a flag is the same after many calls."""
        changed = counted(self.after, numbers_in(self.before))
        return next((key.removeprefix(COUNTED) for key in changed if not isinstance(changed[key][0], bool)), "")


def _stand_in(parameter: Any) -> nn.Parameter:
    shape = tuple(parameter.ds_shape)
    return nn.Parameter(parameter.detach().new_zeros(()).expand(shape), requires_grad=parameter.requires_grad)


def _tried(optimizer: torch.optim.Optimizer, group: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> _Trial:
    """A weight that is held in `shapes`, after steps by the rules of the group."""
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    parts = [nn.Parameter(part.view(s)) for part, s in zip(_split(_numbers(0, device), shapes), shapes, strict=True)]
    before = deepcopy({key: value for key, value in group.items() if key != "params"})
    rules = {**deepcopy(before), "params": parts, "lr": group["lr"] if float(group["lr"]) else 1e-2}
    twin = _twin(optimizer, rules)
    for step in range(_STEPS):
        for part, grad in zip(parts, _split(_numbers(step + 1, device), shapes), strict=True):
            part.grad = grad.view(part.shape).clone()
        twin.step()
    after = {key: value for key, value in twin.param_groups[0].items() if key not in ("params", "lr")}
    values = torch.cat([part.detach().flatten() for part in parts])
    return _Trial(values, dict(twin.state.get(parts[0], {})), before, after)


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
