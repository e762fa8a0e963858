"""`gapfx.load`: a finished run, or a sparse file, as a model for inference that holds its live values alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gapfx.compiler import Pipeline, Unit, realise
from gapfx.errors import UserError
from gapfx.kernels import native
from gapfx.kernels.decode import MAX_TOKENS, Values, quantised, with_spare
from gapfx.masks import bits_of, pack, stored_parameter, write_bits
from gapfx.ops.fixed_linear import layout_of, refusal, with_scales
from gapfx.origin import Origin
from gapfx.passes.lower_inference import LowerInference, served
from gapfx.plan import Plan, Weight
from gapfx.sparse import CompileOptions, compile_model
from gapfx.task import load_task
from gapfx.training import first_batches
from gapfx.two_of_four import capability_of, serve

Kernel = Literal["sparse", "dense"]
Run = Callable[[nn.Module], object]
# Live share up to which a sparse kernel is the faster one in most shapes; see tools/bench_decode.py.
SPARSE_UP_TO = 0.5


@dataclass(frozen=True)
class ServedWeight:
    """What multiplies with a planned weight: `kernel` is "dense" where it is kept, or made, dense, and `reason` why.

    `sparsity` is its share of zeros in the file; `use` says in what layers the weight is.
    """

    fqn: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: Kernel
    use: str
    reason: str = ""


@dataclass(frozen=True)
class Loaded:
    """A model for inference, the plan of its run, what serves each planned weight, and notes of the compiler."""

    module: nn.Module
    plan: Plan
    weights: tuple[ServedWeight, ...]
    notes: tuple[str, ...] = ()

    def kernel(self, fqn: str, tokens: int) -> str:
        """Name of the kernel that takes a call of so many tokens (rows of the input) of a planned weight."""
        weight = next(item for item in self.weights if item.fqn == fqn)
        if weight.use == weight.kernel:
            return weight.use
        if weight.kernel == "dense" or weight.use != "linear":
            return f"{weight.kernel} {weight.use}".strip()
        values = stored_parameter(self.module, fqn)
        if refusal(weight.shape, values.dtype):
            return "dense linear"
        if tokens > MAX_TOKENS:
            return "panels"
        layout = layout_of(values, bits_of(self.module, fqn), weight.shape)
        return "columns" if tokens >= layout.by_number_from else "mask"


@dataclass
class _Watch:
    """Keeps the unit that was compiled."""

    units: list[Unit] = field(default_factory=list[Unit])

    def begin(self, unit: Unit) -> None:
        self.units.append(unit)

    def after(self, name: str, unit: Unit) -> None:
        """Nothing to do."""


def load(
    run: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    values: Values = "fp32",
    kernels: Mapping[str, Kernel] | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The trained model of a finished run, or of a sparse file (`model.gapfx`), for inference.

    It is in eval mode, with its FQNs and forward signature, and has no gradients. It is made by the task of the run, or
    is `model`, a module (changed in place) or a function that makes one; `model(*args, **kwargs)` must run, else a
    batch of the task shows how it runs; a sparse file knows no task. A weight is live where it is not 0. `values` says
    how live values of linear layers are held: "bf16" halves them, "int8" has one scale for each output and also rounds
    the numbers of each token, for up to 15 tokens. `kernels` forces the choice for weights by FQN: "dense" keeps the
    dense weight, as is done by default from half of the weight live on and for fp32 values without native kernels.

    On a CUDA device the model is dense, in bf16 with these `values`, and 2:4 weights of its linear layers have torch's
    semi-structured format there; other patterns have no faster products on it.

    The state_dict has the original keys; planned weights are columns of live values. Raises UserError for a run that is
    not there, not finished, damaged, without its task file, or of another model, and for options that are none.
    """
    return load_run(run, model=model, args=args, kwargs=kwargs, values=values, kernels=kernels, device=device).module


@torch.inference_mode(mode=False)  # tensors made in it have no version, by which kernels tell what is prepared
def load_run(
    run: str | Path,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    values: Values = "fp32",
    kernels: Mapping[str, Kernel] | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """As `load`, with the plan of the run, what serves each of its weights, and the compiler's notes."""
    _check_options(model is not None, args is not None or bool(kwargs), values, kernels or {})
    target = _checked_device(device, values)
    origin = Origin(Path(run))
    plan = origin.plan()
    _check_known(kernels or {}, plan)
    module, batch_run, check = _model(origin, model, args, kwargs or {})
    origin.fill(module)
    if target.type != "cpu":
        return _load_on_cuda(module, plan, values, kernels or {}, target)
    watch = _Watch()
    options = CompileOptions(form="compact")
    given = replace(plan, phases=(), owners=())
    compiled = compile_model(module.train(), batch_run, options, plan=given, watchers=[watch], check=check)
    unit = watch.units[0]
    num_refusals = len(unit.refusals)
    Pipeline((LowerInference(),)).run(unit)
    realise(unit)
    uses = served(unit)
    reasons = dict(unit.refusals)
    weights = tuple(_compact(module, weight, uses, reasons, values, kernels or {}) for weight in plan.weights())
    module.requires_grad_(False).eval()
    notes = (*compiled.notes, *(f"{fqn}: {reason}" for fqn, reason in unit.refusals[num_refusals:]))
    return Loaded(module, replace(plan, owners=compiled.plan.owners), weights, notes)


def _load_on_cuda(
    module: nn.Module, plan: Plan, values: Values, kernels: Mapping[str, Kernel], device: torch.device
) -> Loaded:
    zeros = {w.fqn: 1 - _live_share(stored_parameter(module, w.fqn) != 0) for w in plan.weights()}
    module = module.requires_grad_(False).eval().to(device, torch.bfloat16 if values == "bf16" else None)
    free = [weight for weight in plan.weights() if kernels.get(weight.fqn) != "dense"]
    reasons = dict.fromkeys(zeros, "asked for") | serve(module, free, capability_of(device) or (0, 0))

    def told(weight: Weight) -> ServedWeight:
        reason = reasons[weight.fqn]
        kernel, use = ("dense", "dense") if reason else ("sparse", "2:4")
        return ServedWeight(weight.fqn, weight.shape, zeros[weight.fqn], kernel, use, reason)

    return Loaded(module, plan, tuple(map(told, plan.weights())))


def _live_share(mask: Tensor) -> float:
    return int(mask.sum()) / max(1, mask.numel())


def load_dense(run: str | Path) -> tuple[nn.Module, Run]:
    """The dense model of a finished run, as its task builds it, in eval mode, and what runs it on a batch of the task.

    Raises UserError as `load_run` does.
    """
    origin = Origin(Path(run))
    origin.plan()
    module, batch_run, _ = _model(origin, None, None, {})
    origin.fill(module)
    return module.requires_grad_(False).eval(), batch_run


def _check_options(has_model: bool, has_args: bool, values: str, kernels: Mapping[str, str]) -> None:
    if has_args and not has_model:
        raise UserError("args are given without a model", fix="give model= too; a task shows by itself how it runs")
    for what, value, kind in (
        ("values", values, Values),
        *(("kernels", kernel, Kernel) for kernel in kernels.values()),
    ):
        if value not in get_args(kind):
            raise UserError(f"{what} may not be {value!r}", fix=f"take one of {', '.join(get_args(kind))}")


def _checked_device(device: str | torch.device, values: Values) -> torch.device:
    found = torch.device(device)
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"models are not served on {found.type}", fix="give device='cpu' or 'cuda'")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here", fix="give device='cpu', or install a torch for CUDA")
    if found.type == "cuda" and values == "int8":
        raise UserError("int8 values are for the CPU", fix='give values="bf16" on CUDA')
    return found


def _check_known(kernels: Mapping[str, Kernel], plan: Plan) -> None:
    unknown = [fqn for fqn in kernels if fqn not in plan.group_of()]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no planned weight", fix="the plan of the run lists the planned weights")


def _model(
    origin: Origin,
    model: nn.Module | Callable[[], nn.Module] | None,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
) -> tuple[nn.Module, Run, Run]:
    """The plain model, a forward of it for the capture, and another one to verify."""
    made = model if isinstance(model, nn.Module) or model is None else model()
    if made is not None and (args is not None or kwargs):
        call = partial(_call, args or (), kwargs)
        return made, call, call
    folder = origin.run()
    path, entry = folder.saved_task()
    if not path.is_file():
        raise UserError(
            f"the task file {path} of the run is gone",
            where=str(folder.task),
            fix="put it back, or give load() the model, with args that its forward takes",
        )
    task = load_task(path, entry)
    task.need("data", "loss")
    assert task.loss is not None
    settings = folder.settings()
    built, first, second = first_batches(task, settings)
    return built if made is None else made, partial(_loss, task.loss, first), partial(_loss, task.loss, second)


def _call(args: Sequence[Any], kwargs: Mapping[str, Any], model: nn.Module) -> object:
    return model(*args, **kwargs)


def _loss(loss: Callable[[nn.Module, Any], object], batch: Any, model: nn.Module) -> object:
    return loss(model, batch)


def _compact(
    module: nn.Module,
    weight: Weight,
    uses: Mapping[str, str],
    reasons: Mapping[str, str],
    values: Values,
    kernels: Mapping[str, Kernel],
) -> ServedWeight:
    """Put the live values in the place of a dense weight."""
    parameter = stored_parameter(module, weight.fqn)
    mask = parameter.detach() != 0
    live = _live_share(mask)
    fqns = (weight.fqn, *weight.aliases)
    found = {uses[fqn] for fqn in fqns if uses.get(fqn)}
    use = found.pop() if len(found) == 1 else "dense"
    reason = "" if use != "dense" else next((reasons[fqn] for fqn in fqns if fqn in reasons), _DENSE_USES)
    better_dense = _better_dense(live, values)
    kernel: Kernel = kernels.get(weight.fqn, "dense" if better_dense else "sparse")
    if kernel == "dense":
        reason = "asked for" if weight.fqn in kernels else better_dense
        mask.fill_(True)
    elif not mask.any():
        mask.view(-1)[0] = True  # a weight without any value is taken for one that is away
    if any(hasattr(module.get_submodule(fqn.rpartition(".")[0]), _mask_name(fqn)) for fqn in fqns):
        _hold(module, fqns, parameter, mask, values if use == "linear" and kernel == "sparse" else "fp32")
    if use == "linear" and not reason:
        reason = refusal(weight.shape, parameter.dtype)
    served_by: Kernel = "dense" if reason else "sparse"
    return ServedWeight(weight.fqn, weight.shape, 1 - live, served_by, use, reason)


def _better_dense(live: float, values: Values) -> str:
    """Why a weight is kept dense unless asked otherwise; "" when its live values alone are."""
    if live > SPARSE_UP_TO:
        return f"{live:.0%} of it are live"
    # Making it dense at each call takes ten times as long as its product; narrow values are asked for to save memory.
    missing = native.missing_reason()
    return f"no native kernels: {missing}" if missing and values == "fp32" else ""


_DENSE_USES = "its layers read the weight itself, which is made dense at each call"


def _mask_name(fqn: str) -> str:
    return f"_gapfx_mask_{fqn.rpartition('.')[2]}"


def _hold(module: nn.Module, fqns: tuple[str, ...], parameter: nn.Parameter, mask: Tensor, values: Values) -> None:
    for fqn in fqns:
        write_bits(module, fqn, pack(mask))
    column = parameter.detach()[mask]
    parameter.requires_grad_(False)
    if values == "int8":
        parameter.data = with_scales(*quantised(column, mask))
    else:
        parameter.data = with_spare(column.bfloat16() if values == "bf16" else column).view(-1, 1)
