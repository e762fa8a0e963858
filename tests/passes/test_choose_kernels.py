"""Which kernel each weight gets, by the times of its cases; and what lower-sparse does with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from gapfx.calibration import Case, Times
from gapfx.calibration.cache import write_times
from gapfx.compiler import Unit, realise
from gapfx.kernels import native
from gapfx.masks import pack, stored_parameter, write_bits
from gapfx.ops.linear import linear
from gapfx.ops.sparse_linear import sparse_linear
from gapfx.passes import AllocateSparsity, ChooseKernels, LowerCompact, LowerSparse, Partition, default_pipeline
from gapfx.passes.choose_kernels import KernelChoices
from gapfx.text import format_graph
from tests.kernels.needs import needs_kernels
from tests.models import captured

pytestmark = needs_kernels


class Layers(nn.Module):
    """A large layer, a small one, one that is used twice, and one inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.twice = nn.Linear(64, 256), nn.Linear(256, 8), nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        return self.small(self.large(self.attention(x, x, x, need_weights=False)[0]))


def a_unit(sparsity: float = 0.75) -> Unit:
    pipeline = default_pipeline(partition=Partition(groups=1), allocate=AllocateSparsity(sparsity))
    unit = pipeline.run(Unit(captured(Layers(), torch.randn(4, 20, 64))))
    LowerCompact().apply(unit)
    return unit


def keep_times(unit: Unit, times: Mapping[str, Times]) -> None:
    """As if the cases of these weights had been measured."""
    choices = unit.fact(ChooseKernels("plan")).by_weight
    assert write_times({case.key(): times[fqn] for fqn in times for case in choices[fqn].cases}) == ""


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAPFX_CACHE", str(tmp_path))


def kernels(choices: KernelChoices) -> dict[str, str]:
    return {fqn: choice.kernel for fqn, choice in choices.by_weight.items()}


def test_the_faster_kernel_is_chosen_and_a_level_one_is_not() -> None:
    unit = a_unit()
    keep_times(unit, {"large.weight": Times(3e-3, 4e-3, 1e-3), "twice.weight": Times(3e-3, 3e-3, 2.9e-3)})
    choices = unit.fact(ChooseKernels())
    assert kernels(choices)["large.weight"] == "sparse"
    assert kernels(choices)["twice.weight"] == "expand"
    assert choices.notes == ()


def test_the_plan_holds_the_gain_and_the_positions_of_all_uses() -> None:
    unit = a_unit()
    keep_times(unit, {"large.weight": Times(3e-3, 4e-3, 1e-3), "twice.weight": Times(4e-3, 3e-3, 1e-3)})
    choices = unit.fact(ChooseKernels())
    plan = choices.taken({"large.weight", "twice.weight"}).on(unit.latest(AllocateSparsity))
    found = {w.fqn: (w.kernel, w.gain, w.positions) for w in plan.weights()}
    assert found["large.weight"] == ("sparse", 3.0, 80)
    assert found["twice.weight"] == ("sparse", 4.0, 160)


def test_what_took_no_effect_is_not_in_the_plan() -> None:
    unit = a_unit()
    keep_times(unit, {"large.weight": Times(3e-3, 4e-3, 1e-3), "twice.weight": Times(4e-3, 3e-3, 1e-3)})
    plan = unit.fact(ChooseKernels()).taken(set()).on(unit.latest(AllocateSparsity))
    assert {w.kernel for w in plan.weights()} == {"expand"}
    assert {w.fqn: w.gain for w in plan.weights()}["large.weight"] == 0.75


def keep_times_of_blocks(unit: Unit, fqn: str, times: Mapping[str, Times]) -> None:
    """As if the cases of this weight had been measured with these patterns."""
    cases = unit.fact(ChooseKernels("plan")).by_weight[fqn].cases
    measured = {dataclasses.replace(case, pattern=p).key(): of_p for p, of_p in times.items() for case in cases}
    assert write_times(measured) == ""


@pytest.mark.parametrize(
    ("finest", "four", "sixteen", "chosen"),
    [
        (1e-3, 0.9e-3, 0.9e-3, "unstructured"),
        (1e-3, 0.7e-3, 0.6e-3, "block:4x1"),
        (1e-3, 0.7e-3, 0.5e-3, "block:16x1"),
        (4e-3, 2e-3, 1.9e-3, "block:4x1"),
        (4e-3, 3.9e-3, 3.9e-3, "unstructured"),
    ],
)
def test_a_coarser_pattern_has_to_win_by_a_fifth(finest: float, four: float, sixteen: float, chosen: str) -> None:
    unit = a_unit()
    times = {"unstructured": finest, "block:4x1": four, "block:16x1": sixteen}
    keep_times_of_blocks(unit, "large.weight", {p: Times(3e-3, 4e-3, sparse) for p, sparse in times.items()})
    choices = unit.fact(ChooseKernels(blocks=True))
    plan = choices.taken({"large.weight"}).on(unit.latest(AllocateSparsity))
    patterns = {w.fqn: w.pattern for w in plan.weights()}
    assert patterns["large.weight"] == chosen
    not_taken = choices.taken(set()).on(unit.latest(AllocateSparsity))
    assert {w.pattern for w in not_taken.weights()} == {"unstructured"}


class Experts(nn.Module):
    """Two experts, of which the second is sent nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x[:0])])


def test_an_expert_that_was_sent_nothing_has_no_time_to_compare() -> None:
    pipeline = default_pipeline(partition=Partition(groups=1), allocate=AllocateSparsity(0.75))
    unit = pipeline.run(Unit(captured(Experts(), torch.randn(4, 64))))
    LowerCompact().apply(unit)
    choices = unit.fact(ChooseKernels())
    assert [len(choices.by_weight[fqn].cases) for fqn in ("first.weight", "second.weight")] == [1, 0]
    plan = choices.on(unit.latest(AllocateSparsity))
    assert [weight.kernel for weight in plan.weights()] == ["expand", "expand"]


def test_without_measuring_a_weight_stays_unstructured() -> None:
    unit = a_unit(0.9)
    choices = unit.fact(ChooseKernels(calibrate=False, blocks=True))
    assert {choice.pattern for choice in choices.by_weight.values()} == {""}


def test_only_blocks_that_fit_the_shape_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def measure(case: Case) -> Times:
        timed.append(case.pattern)
        return Times(3e-3, 3e-3, 2e-3)

    monkeypatch.setattr("gapfx.calibration.table.measure", measure)
    unit = default_pipeline(partition=Partition(groups=1)).run(Unit(captured(nn.Linear(64, 252), torch.randn(80, 64))))
    LowerCompact().apply(unit)
    unit.fact(ChooseKernels(blocks=True))
    assert sorted(timed) == ["block:4x1", "unstructured"]


def test_small_layers_are_neither_measured_nor_made_sparse() -> None:
    choices = a_unit().fact(ChooseKernels(calibrate=False))
    assert kernels(choices)["small.weight"] == "expand"
    assert not choices.by_weight["small.weight"].is_measured


def test_a_product_outside_of_its_module_has_no_kernel() -> None:
    choices = a_unit().fact(ChooseKernels("sparse", calibrate=False))
    assert kernels(choices)["attention.in_proj_weight"] == "expand"
    assert "stands in the forward" in choices.by_weight["attention.in_proj_weight"].reason


def test_a_given_plan_is_followed_without_measuring() -> None:
    unit = a_unit()
    plan = unit.latest(AllocateSparsity)
    weights = tuple(
        dataclasses.replace(w, kernel="sparse", gain=2.5, positions=7) if w.fqn == "large.weight" else w
        for w in plan.groups[0].weights
    )
    given = dataclasses.replace(plan, groups=(dataclasses.replace(plan.groups[0], weights=weights),))
    unit.assume(AllocateSparsity, given)
    choices = unit.fact(ChooseKernels("plan"))
    assert [fqn for fqn, kernel in kernels(choices).items() if kernel == "sparse"] == ["large.weight"]
    assert choices.taken({"large.weight"}).on(given) == given


def lowered(unit: Unit) -> dict[str, list[object]]:
    found = {
        fqn: [node.target for node in owner.graph.graph.nodes if node.target in (linear, sparse_linear)]
        for fqn, owner in unit.owners.items()
    }
    return {fqn: targets for fqn, targets in found.items() if targets}


def test_lower_sparse_swaps_the_op_of_chosen_weights_alone() -> None:
    unit = a_unit()
    keep_times(unit, {"large.weight": Times(3e-3, 4e-3, 1e-3), "twice.weight": Times(4e-3, 3e-3, 3e-3)})
    before, num_nodes = unit.text(), unit.num_nodes()
    assert LowerSparse().apply(unit)
    assert unit.num_nodes() == num_nodes
    assert lowered(unit) == {"large": [sparse_linear], "small": [linear], "twice": [linear]}
    changed = [pair for pair in zip(before.splitlines(), unit.text().splitlines(), strict=True) if pair[0] != pair[1]]
    assert [after.split()[1:3] for _, after in changed] == [["call_function", "sparse_linear(input_1,"]]
    assert not LowerSparse().apply(unit)
    assert unit.refusals == []


def test_the_graph_of_a_sparse_layer(golden: Callable[[str, str], None]) -> None:
    unit = a_unit()
    unit.choose(ChooseKernels("sparse", calibrate=False))
    assert LowerSparse().apply(unit)
    golden("lower_sparse", format_graph(unit.owners["large"].graph))


def test_refused_weights_are_named_when_sparse_kernels_were_asked_for() -> None:
    unit = a_unit()
    unit.choose(ChooseKernels("sparse", calibrate=False))
    LowerSparse().apply(unit)
    assert [fqn for fqn, _ in unit.refusals] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert unit.refusals[0][1].startswith("no sparse kernel: no product")


def test_without_native_kernels_nothing_is_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = a_unit()
    native.library.cache_clear()
    native.missing_reason.cache_clear()
    monkeypatch.setenv("GAPFX_NATIVE", "0")
    try:
        choices = unit.fact(ChooseKernels("sparse", calibrate=False))
    finally:
        monkeypatch.delenv("GAPFX_NATIVE")
        native.library.cache_clear()
        native.missing_reason.cache_clear()
    assert set(kernels(choices).values()) == {"expand"}
    assert "switched off" in choices.by_weight["large.weight"].reason


def test_a_sparse_model_gives_what_the_dense_one_gives_up_to_rounding() -> None:
    unit = a_unit()
    model = unit.capture.model
    unit.choose(ChooseKernels("sparse", calibrate=False))
    LowerSparse().apply(unit)
    realise(unit)
    for weight in unit.latest(AllocateSparsity).weights():
        mask = torch.rand(weight.shape) < 0.25
        write_bits(model, weight.fqn, pack(mask))
        with torch.no_grad():
            stored_parameter(model, weight.fqn).masked_fill_(~mask, 0)
    x = torch.randn(4, 20, 64)
    with torch.no_grad():
        wanted = model(x)
        for weight in unit.latest(AllocateSparsity).weights():
            parameter = stored_parameter(model, weight.fqn)
            path, _, held = weight.fqn.rpartition(".")
            values = nn.Parameter(parameter.detach()[parameter != 0].view(-1, 1))
            vars(model.get_submodule(path))["_parameters"][held] = values
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
