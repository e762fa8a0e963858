"""`gapfx.hold`: masks in a training loop of one's own, by hooks on parameters and optimizer; the model stays as it is.

Gradients are 0 where a mask drops, and after each step of the optimizer weights are exactly 0 there. So any optimizer
that works element by element keeps them 0, also under DistributedDataParallel, FSDP2 and Accelerate, with mixed
precision and accumulated gradients. With a plan the masks follow its phases: groups grow and are pruned step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.criterion import CRITERIA, ByGradient
from gapfx.errors import UserError
from gapfx.masks import fill_masked, pack, unpack
from gapfx.pattern import parse_pattern
from gapfx.plan import Phase, Plan, Weight
from gapfx.runtime.grow_prune import check_prunes
from gapfx.runtime.seeds import generator

_STATE_VERSION = 1


def hold(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    masks: Mapping[str, Tensor] | None = None,
    plan: Plan | None = None,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
) -> Held:
    """Keep masked weights of a model 0 while an optimizer trains it, until `remove()` of what comes out.

    `masks` are bool tensors by FQN, True = kept; `masks_from_zeros` makes them of a sparse checkpoint. Or a `plan` with
    phases (gapfx.with_schedule) makes and changes them: seeds and weights being alike, all ranks get the same. FQNs are
    those of the model inside of a data-parallel wrapper. A model that was loaded from a checkpoint goes on with the
    `state_dict()` of then as `state`: the masks that a plan starts with would zero what it has learned.

    Raises UserError for a model without such parameters, an optimizer whose steps cannot be followed, a plan that
    needs gapfx's own runtime, and one with prunes that a pattern cannot make.
    """
    if (masks is None) == (plan is None):
        raise UserError(
            "hold() takes either masks or a plan", fix="give masks=... of the model, or plan=... with phases"
        )
    held = Held(_bare(model), plan)
    if plan is not None:
        _check_plan(plan)
    if state is not None:
        held.take(state, {weight.fqn for weight in plan.weights()} if plan else set(masks or {}))
    elif plan is not None:
        held.masks = held.start_masks(plan, seed)
    else:
        held.masks = {fqn: mask.bool() for fqn, mask in (masks or {}).items()}
    held.attach(optimizer)
    return held


def _bare(model: nn.Module) -> nn.Module:
    """The model inside of data-parallel wrappers and torch.compile's, by whose names parameters are known."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def masks_from_zeros(model: nn.Module, *, least: float = 0.3) -> dict[str, Tensor]:
    """Masks of the weights of two or more dimensions of which at least the share `least` is 0: those of a sparse model.

    Bool tensors by FQN, True where a weight is not 0.

    Raises UserError when there are none.
    """
    found = {
        fqn: parameter.detach() != 0
        for fqn, parameter in model.named_parameters()
        if parameter.dim() > 1 and int((parameter.detach() == 0).sum()) >= least * parameter.numel()
    }
    if not found:
        raise UserError(
            f"no weight of the model has {least:.0%} zeros", fix="load a sparse checkpoint first, or give masks"
        )
    return found


class Held:
    """Masks that are held, as `hold` makes them.

    `masks` are the bool tensors now in force, by FQN, True = kept. `num_steps` counts the steps of the optimizer;
    `phase` is the index of the plan's phase, the number of phases after the last one.
    """

    def __init__(self, model: nn.Module, plan: Plan | None) -> None:
        self.model, self.plan = model, plan
        self.masks: dict[str, Tensor] = {}
        self.num_steps, self.phase = 0, 0
        self._parameters = dict(model.named_parameters())
        self._handles: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook the parameters and the optimizer, and apply the masks. Raises UserError as `hold` does."""
        inner: Any = getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper
        if not isinstance(inner, torch.optim.Optimizer) or "DeepSpeed" in type(optimizer).__name__:
            raise UserError(
                f"the steps of {type(optimizer).__name__} cannot be followed: it keeps weights of its own",
                fix="train with `gapfx sparsify`, whose runtime is DeepSpeed's, or give a torch optimizer",
            )
        parameters = self._parameters
        for fqn, mask in self.masks.items():
            if fqn not in parameters or parameters[fqn].shape != mask.shape:
                raise UserError(f"the model has no parameter {fqn!r} of shape {list(mask.shape)}", fix=_OTHER_MODEL)
            self.masks[fqn] = mask.to(parameters[fqn].device)
        self._optimizer = inner
        for fqn in self.masks:
            hook = parameters[fqn].register_post_accumulate_grad_hook(lambda p, fqn=fqn: self._mask_gradient(p, fqn))
            self._handles.append(hook)
        self._handles.append(inner.register_step_post_hook(self._after_step))
        self.apply()

    def remove(self) -> None:
        """Take the hooks off; weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def apply(self) -> None:
        """Make weights 0 where their mask drops."""
        for fqn, parameter in self._masked():
            fill_masked(parameter.data, self.masks[fqn])

    @property
    def sparsity(self) -> float:
        """Share of zeros by the masks over all weights that have one."""
        numel = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / max(1, numel)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside model and optimizer: masks as packed bits, and where the phases are."""
        bits = {fqn: pack(mask.cpu()) for fqn, mask in self.masks.items()}
        return {"version": _STATE_VERSION, "num_steps": self.num_steps, "phase": self.phase, "bits": bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose weights are in the model. Raises UserError for one of another model."""
        self.take(state, set(self.masks))
        self.apply()

    def take(self, state: Mapping[str, Any], fqns: set[str]) -> None:
        """Masks, of these weights, and place in the phases of a checkpoint. Raises UserError for one of others."""
        if state.get("version") != _STATE_VERSION or set(state["bits"]) != fqns or fqns - self._parameters.keys():
            raise UserError("the masks are those of another model", fix=_OTHER_MODEL)
        self.num_steps, self.phase = int(state["num_steps"]), int(state["phase"])
        for fqn, bits in state["bits"].items():
            parameter = self._parameters[fqn]
            self.masks[fqn] = unpack(bits.cpu(), parameter.shape).to(parameter.device)

    def start_masks(self, plan: Plan, seed: int) -> dict[str, Tensor]:
        """A bool mask for every planned weight: all True where the first phase grows, else by `plan.start_masks`."""
        parameters, group_of = self._parameters, plan.group_of()
        grown, masks = set(plan.phases[0].grow), dict[str, Tensor]()
        for index, weight in enumerate(plan.weights()):
            if weight.fqn not in parameters:
                raise UserError(f"the model has no parameter {weight.fqn!r}", fix=_OTHER_MODEL)
            if group_of[weight.fqn] in grown:
                masks[weight.fqn] = torch.ones(weight.shape, dtype=torch.bool)
                continue
            value = parameters[weight.fqn].detach()
            masks[weight.fqn] = _new_mask(weight, value, plan.start_masks, generator(seed, 0, index))
        return masks

    def _masked(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((fqn, self._parameters[fqn]) for fqn in self.masks)

    def _mask_gradient(self, parameter: Tensor, fqn: str) -> None:
        if parameter.grad is not None:
            fill_masked(parameter.grad, self.masks[fqn])

    def _after_step(self, *_: object) -> None:
        self.apply()
        self.num_steps += 1
        if self.plan is None:
            return
        phases = self.plan.phases
        while self.phase < len(phases) and self.num_steps >= phases[self.phase].stop:
            self._prune(phases[self.phase])
            self.phase += 1
            if self.phase < len(phases):
                self._begin(phases[self.phase])

    @torch.no_grad()
    def _prune(self, phase: Phase) -> None:
        assert self.plan is not None
        parameters, plan = self._parameters, self.plan.eased(self.phase)
        draw = torch.Generator().manual_seed(self.num_steps)
        for group in phase.prune:
            for weight in plan.groups[group].weights:
                parameter = parameters[weight.fqn]
                mask = _new_mask(weight, parameter.detach(), plan.criterion, draw).to(parameter.device)
                self.masks[weight.fqn] = mask
                self._forget_dropped(parameter, mask)
        self.apply()

    def _begin(self, phase: Phase) -> None:
        assert self.plan is not None
        assert self._optimizer is not None
        for group in phase.grow:
            for weight in self.plan.groups[group].weights:
                self.masks[weight.fqn] = torch.ones_like(self.masks[weight.fqn])
        if phase.state == "reset":
            self._optimizer.state.clear()

    def _forget_dropped(self, parameter: nn.Parameter, mask: Tensor) -> None:
        assert self._optimizer is not None
        for value in self._optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                fill_masked(value, mask)


_OTHER_MODEL = "give the masks, the plan or the checkpoint of this model"


def _new_mask(weight: Weight, value: Tensor, criterion: str, draw: torch.Generator) -> Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # pyright: ignore
    score = CRITERIA[criterion](whole.cpu(), draw)
    return parse_pattern(weight.pattern).mask(score, weight.sparsity)


def _check_plan(plan: Plan) -> None:
    if not plan.phases:
        raise UserError("the plan has no phases", fix="make them: gapfx.with_schedule(plan, 'gap', gapfx.Budget(...))")
    plain = Phase("", 0, 1)
    keys = ("replicas", "drop", "growth", "keep", "rewind", "soften")
    strange = [(key, p.name) for p in plan.phases for key in keys if getattr(p, key) != getattr(plain, key)]
    found = [f"{key} of phase {name!r}" for key, name in strange]
    found += ["one threshold over a group"] if plan.allocation == "global" else []
    found += [
        f"the criterion {name!r}, which takes a gradient,"
        for name in (plan.criterion, plan.start_masks)
        if isinstance(CRITERIA[name], ByGradient)
    ]
    if found:
        raise UserError(f"{found[0]} needs gapfx's own runtime", fix="use `gapfx sparsify`, or gap, acdc or gmp")
    check_prunes(plan)
