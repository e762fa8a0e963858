"""The warm-up of regrown weights: each of their updates is that of an Adam of their own age, times a ramp."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gapfx.errors import UserError
from gapfx.masks import pack
from gapfx.plan import Plan
from gapfx.runtime.engine import Engine, EngineOptions
from gapfx.runtime.exchange import build_module, fill_engine, take_state
from gapfx.runtime.grow_prune import layout_of
from gapfx.runtime.regrow import Grown, regrowth
from gapfx.runtime.skeleton import skeleton_of
from gapfx.runtime.state import TrainState
from tests.runs import TASK, assert_same_bits, gapfx, weights

LR, DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.99), 1e-12
FIRST, SECOND, RAMP = 6, 9, 4  # steps of the phases, and of the warm-up
FQN = "2.weight"
Batch = tuple[Tensor, Tensor]
pytestmark = pytest.mark.usefixtures("in_process_group")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 15), nn.Tanh(), nn.Linear(15, 3))


def batch(step: int) -> Batch:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].argmax(1)


def loss(model: nn.Module, given: Batch) -> Tensor:
    return F.cross_entropy(model(given[0]), given[1])


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR)


def is_new() -> Tensor:
    """Which weights were masked before they grew."""
    return torch.rand(15, 16, generator=torch.Generator().manual_seed(3)) < 0.7


def phase(state: TrainState, factory: Any, zero: int, start: int, stop: int, ramp: int) -> None:
    """One engine's steps from where the state is; the model is as it was, FQN alone has new weights."""
    options = EngineOptions(16, clip=0.0, zero_stage=zero)
    engine = Engine(build_module(Plan(()), skeleton_of(make_model()), state, frozenset(), options), factory, options)
    fill_engine(engine, state)
    with regrowth(engine, state, [FQN], start, ramp) as grown:
        while state.step < stop:
            engine.train_step([batch(state.step)], loss, 1.0)
            state.step += 1
        if stop == FIRST + SECOND:
            grown.settle()
    take_state(engine, state, is_last=True)
    engine.close()


def run(factory: Any, zero: int, ramp: int, stops: tuple[int, ...] = (FIRST + SECOND,), *, reset: bool = False) -> Any:
    """A first phase, the growth of FQN from 0, and a second one, with a new engine after each of `stops`."""
    model = make_model()
    values = {fqn: p.detach().flatten().clone() for fqn, p in model.named_parameters()}
    layout = layout_of({fqn: tuple(p.shape) for fqn, p in model.named_parameters()}, Plan(()))
    state, ones = TrainState(layout, values), torch.ones(15, 16, dtype=torch.bool)
    state.sparse_bits[FQN] = pack(ones)
    phase(state, factory, zero, 0, FIRST, ramp)
    if reset:
        state.optimizer = type(state.optimizer)()
    state.sparse_bits[FQN] = pack(~is_new())
    for table in state.tables(FQN):
        table[FQN] = table[FQN].masked_fill(is_new().flatten(), 0)
    for stop in stops:
        phase(state, factory, zero, FIRST, stop, ramp)
    return state


@dataclass
class Reference:
    """AdamW in which every weight has an age."""

    model: nn.Module = field(default_factory=make_model)
    moments: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    age: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        for fqn, p in self.model.named_parameters():
            self.moments[fqn] = [torch.zeros_like(p), torch.zeros_like(p)]
            self.age[fqn] = torch.zeros_like(p)

    @torch.no_grad()
    def grow(self) -> None:
        for table in (*self.moments[FQN], self.age[FQN], dict(self.model.named_parameters())[FQN]):
            table[is_new()] = 0

    def step(self, index: int, ramp: int) -> None:
        self.model.zero_grad()
        loss(self.model, batch(index)).backward()
        with torch.no_grad():
            for fqn, p in self.model.named_parameters():
                self._update(fqn, p, ramp if index >= FIRST else 1)

    def _update(self, fqn: str, p: Tensor, ramp: int) -> None:
        assert p.grad is not None
        (m, v), age = self.moments[fqn], self.age[fqn].add_(1)
        m.mul_(BETAS[0]).add_(p.grad * (1 - BETAS[0]))
        v.mul_(BETAS[1]).add_(p.grad**2 * (1 - BETAS[1]))
        corrected = [moment / (1 - beta**age) for moment, beta in zip((m, v), BETAS, strict=True)]
        # Weights that were there before have an age above that of the ramp's end.
        scale = (age / ramp).clamp(max=1) if fqn == FQN else torch.ones_like(p)
        scale = torch.where(is_new(), scale, 1) if fqn == FQN else scale
        decay = self._decay(fqn, age, scale)
        p.sub_(LR * (scale * corrected[0] / (corrected[1].sqrt() + EPS) + decay * p))

    def _decay(self, fqn: str, age: Tensor, scale: Tensor) -> Tensor:
        """The whole update is scaled, so the decay of new weights is as well, by what makes up for their age too."""
        if fqn != FQN or float(age.max()) <= FIRST:
            return DECAY * torch.ones_like(age)
        late = age.max()
        own = [(1 - beta**late) / (1 - beta**age) for beta in BETAS]
        return DECAY * scale * own[0] / own[1].sqrt()


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ramp", [1, RAMP])
def test_new_weights_are_updated_by_an_adam_of_their_own_age(ramp: int, zero: int) -> None:
    reference = Reference()
    for index in range(FIRST + SECOND):
        if index == FIRST:
            reference.grow()
        reference.step(index, ramp)
    state = run(adamw, zero, ramp)
    for fqn, p in reference.model.named_parameters():
        torch.testing.assert_close(state.weights[fqn].view(p.shape), p.detach(), rtol=0, atol=2e-6)
    # Once settled, the step that all share is right for their moments.
    for key, moment, beta in zip(("exp_avg", "exp_avg_sq"), reference.moments[FQN], BETAS, strict=True):
        ours = state.optimizer.moments[key][FQN].view(15, 16) / (1 - beta ** (FIRST + SECOND))
        torch.testing.assert_close(ours, moment / (1 - beta ** reference.age[FQN]), rtol=1e-4, atol=1e-9)


def test_the_first_update_is_what_it_is_without_it_times_the_formula() -> None:
    with_it, without = (run(adamw, 1, ramp, (FIRST + 1,)).weights[FQN].view(15, 16)[is_new()] for ramp in (1, 0))
    late = FIRST + 1
    missing = math.sqrt((1 - BETAS[1] ** late) / (1 - BETAS[1])) * (1 - BETAS[0]) / (1 - BETAS[0] ** late)
    torch.testing.assert_close(without, with_it * missing, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("age", "times"), [(1, 3.16), (12, 6.57), (100, 3.24), (10_000, 1.0)])
def test_late_in_a_run_adam_would_take_new_weights_several_times_too_far(age: int, times: float) -> None:
    grown = Grown(None, torch.empty(0), (0.9, 0.999), 1e6)
    assert 1 / grown.factor(age) == pytest.approx(times, abs=0.01)


@pytest.mark.parametrize("factory", [adamw, sgd])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_new_engine_in_the_middle_of_the_phase_goes_on_bit_for_bit(zero: int, factory: Any) -> None:
    once, thrice = (run(factory, zero, RAMP, stops) for stops in ((15,), (FIRST + 2, FIRST + 5, 15)))
    for fqn, value in once.weights.items():
        assert torch.equal(value, thrice.weights[fqn])
    for key, moments in once.optimizer.moments.items():
        assert all(torch.equal(value, thrice.optimizer.moments[key][fqn]) for fqn, value in moments.items())


@pytest.mark.parametrize(("factory", "reset"), [(sgd, False), (adamw, True)])
def test_the_ramp_alone_is_left_where_nothing_has_an_age(factory: Any, reset: bool) -> None:
    warm, cold = (run(factory, 1, ramp, (FIRST + 1,), reset=reset).weights[FQN].view(15, 16) for ramp in (RAMP, 0))
    torch.testing.assert_close(warm[is_new()], cold[is_new()] / RAMP, rtol=1e-6, atol=0)
    assert torch.equal(warm[~is_new()], cold[~is_new()])


def test_an_optimizer_with_a_correction_of_another_kind_is_refused() -> None:
    def radam(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.RAdam(params, lr=LR)

    with pytest.raises(UserError, match="regrow_warmup does not fit RAdam: how it corrects"):
        run(radam, 1, RAMP)
    run(radam, 1, 0)


def trained(out: Path, *flags: object) -> Path:
    given = ("--state", "carry", "--regrow-warmup", 5, "--clip", 0, *flags)
    assert gapfx("sparsify", TASK, "--out", out, *given) == 0
    return out


@pytest.mark.parametrize("flags", [(), ("--dtype", "bf16"), ("--zero", 3)], ids=["fp32", "bf16", "stage 3"])
def test_both_forms_end_in_the_same_bits(flags: tuple[object, ...], tmp_path: Path) -> None:
    assert_same_bits(*(trained(tmp_path / form, "--form", form, *flags) for form in ("masked", "compact")))
    plain = trained(tmp_path / "plain", "--regrow-warmup", 0, *flags)
    assert not torch.equal(weights(plain)["blocks.1.up.weight"], weights(tmp_path / "masked")["blocks.1.up.weight"])


def test_a_ramp_that_a_partial_prune_would_cut_off_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--rounds", 1, "--phase-epochs", 0.5, "--finetune-epochs", 0.25, "--landing", 4)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "cut", *flags, "--regrow-warmup", 3) == 2
    assert "new weights warm up over 3 steps, but 'round 1 group 2' prunes after 2" in capsys.readouterr().err
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", *flags, "--regrow-warmup", 2) == 0
