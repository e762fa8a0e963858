"""Units, pipelines and their text form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import fx, nn

from gapfx.compiler import PASSES, Analysis, Pass, Pipeline, Rewrite, Unit, parse_pipeline, register
from gapfx.errors import PassError, UserError
from gapfx.passes import (
    AllocateSparsity,
    FindBlocks,
    FindWeights,
    FoldMasks,
    InsertMasks,
    Partition,
    TieWeights,
    default_pipeline,
)
from tests.models import captured, mlp

COMPUTED: list[Pass] = []


@dataclass(frozen=True)
class Size(Analysis[int]):
    """How large: its own option."""

    name: ClassVar[str] = "size"
    value: int = 1

    def compute(self, unit: Unit) -> int:
        COMPUTED.append(self)
        return self.value


@dataclass(frozen=True)
class Twice(Analysis[int]):
    """Twice the chosen size."""

    name: ClassVar[str] = "twice"

    def compute(self, unit: Unit) -> int:
        COMPUTED.append(self)
        return 2 * unit.latest(Size)


@dataclass(frozen=True)
class FourTimes(Analysis[int]):
    """Twice `Twice`, which it asks for directly."""

    name: ClassVar[str] = "four-times"

    def compute(self, unit: Unit) -> int:
        COMPUTED.append(self)
        return 2 * unit.fact(Twice())


@dataclass(frozen=True)
class Circle(Analysis[int]):
    name: ClassVar[str] = "circle"

    def compute(self, unit: Unit) -> int:
        return unit.fact(Circle())


@dataclass(frozen=True)
class Required(Analysis[int]):
    name: ClassVar[str] = "required"
    value: int

    def compute(self, unit: Unit) -> int:
        return self.value


@dataclass(frozen=True)
class AddNode(Rewrite):
    """Adds `relu` in front of every output, or claims to have changed nothing."""

    name: ClassVar[str] = "add-node"
    preserves: ClassVar[tuple[type[Analysis[Any]], ...]] = (Size,)
    is_on: bool = True
    breaks: bool = False

    def apply(self, unit: Unit) -> bool:
        for owner in unit.owners.values() if self.is_on else ():
            output = owner.graph.graph.output_node()
            with owner.graph.graph.inserting_before(output):
                new = owner.graph.graph.call_function(nn.functional.relu, (output.args[0],))
                if self.breaks:
                    owner.graph.graph.create_node("get_attr", "missing")
            output.args = (new,)
        return self.is_on


@dataclass(frozen=True)
class Fails(Rewrite):
    name: ClassVar[str] = "fails"
    is_users_fault: bool = False

    def apply(self, unit: Unit) -> bool:
        if self.is_users_fault:
            raise UserError("a wrong option")
        raise KeyError("a bug")


@pytest.fixture
def unit() -> Unit:
    COMPUTED.clear()
    return Unit(captured(mlp(), torch.randn(2, 6)))


def test_a_fact_is_computed_once_for_each_frozen_instance(unit: Unit) -> None:
    assert [unit.fact(Size(3)), unit.fact(Size(3)), unit.fact(Size(4))] == [3, 3, 4]
    assert COMPUTED.copy() == [Size(3), Size(4)]


def test_latest_answers_with_the_default_instance_until_another_is_chosen(unit: Unit) -> None:
    assert (unit.latest(Size), unit.chosen(Size)) == (1, Size())
    unit.choose(Size(5))
    assert (unit.latest(Size), unit.chosen(Size)) == (5, Size(5))


def test_another_choice_forgets_what_rested_on_the_old_one_also_through_other_facts(unit: Unit) -> None:
    assert unit.fact(FourTimes()) == 4
    unit.choose(Size(5))
    assert (unit.latest(Twice), unit.fact(FourTimes())) == (10, 20)


def test_a_fact_that_rests_on_a_remembered_fact_is_forgotten_with_it(unit: Unit) -> None:
    assert unit.fact(Twice()) == 2
    assert unit.fact(FourTimes()) == 4  # Twice is not computed again here
    unit.choose(Size(5))
    assert unit.fact(FourTimes()) == 20


def test_choosing_the_same_instance_again_forgets_nothing(unit: Unit) -> None:
    unit.choose(Size())
    unit.latest(Twice)
    unit.choose(Size())
    unit.latest(Twice)
    assert COMPUTED.copy() == [Twice(), Size()]


def test_an_assumption_answers_until_the_next_choice(unit: Unit) -> None:
    assert unit.latest(Twice) == 2
    unit.assume(Size, 50)
    assert unit.latest(Twice) == 100
    unit.forget()
    assert unit.latest(Size) == 50
    unit.choose(Size())
    assert unit.latest(Twice) == 2


def test_facts_survive_a_rewrite_only_when_preserved(unit: Unit) -> None:
    assert (unit.fact(Size()), unit.fact(Twice())) == (1, 2)
    Pipeline((AddNode(is_on=False),)).run(unit)
    assert (unit.fact(Size()), unit.fact(Twice())) == (1, 2)
    assert COMPUTED.copy() == [Size(), Twice()]
    Pipeline((AddNode(),)).run(unit)
    assert (unit.fact(Size()), unit.fact(Twice())) == (1, 2)
    assert COMPUTED.copy() == [Size(), Twice(), Twice()]


def test_analyses_that_ask_each_other_in_a_circle_are_named(unit: Unit) -> None:
    with pytest.raises(PassError, match="in a circle: circle -> circle"):
        unit.fact(Circle())


def test_an_analysis_with_required_options_has_to_be_chosen(unit: Unit) -> None:
    with pytest.raises(PassError, match="required has options without defaults"):
        unit.latest(Required)
    unit.choose(Required(7))
    assert unit.latest(Required) == 7


def test_a_refusal_is_remembered_once(unit: Unit) -> None:
    unit.refuse("0.weight", "too small")
    unit.refuse("0.weight", "too small")
    assert unit.refusals == [("0.weight", "too small")]


def test_a_failed_pass_is_named_with_those_before_it(unit: Unit) -> None:
    with pytest.raises(
        PassError, match=r"the pass fails failed: KeyError: 'a bug'\n  passes before it: size\{value=3\}"
    ):
        Pipeline((Size(3), Fails())).run(unit)


def test_a_users_mistake_passes_through_unchanged(unit: Unit) -> None:
    with pytest.raises(UserError, match=r"^a wrong option$"):
        Pipeline((Fails(is_users_fault=True),)).run(unit)


def test_a_rewrite_that_leaves_a_broken_graph_fails_at_once(unit: Unit) -> None:
    with pytest.raises(PassError, match=r"the pass add-node.* failed: .*missing"):
        Pipeline((AddNode(breaks=True),)).run(unit)


def test_changed_graphs_are_recompiled(unit: Unit) -> None:
    Pipeline((AddNode(),)).run(unit)
    assert all("relu" in owner.graph.code for owner in unit.owners.values())


def test_the_observer_sees_the_texts_and_the_number_of_nodes(unit: Unit) -> None:
    seen: list[tuple[str, bool, int, int]] = []
    Pipeline((Size(), AddNode()), lambda *told: seen.append((told[0], told[1] == told[2], *told[3:]))).run(unit)
    assert seen == [("size", True, 15, 15), ("add-node", False, 15, 18)]


def test_owner_graphs_before_and_after_the_masks(unit: Unit, golden: Callable[[str, str], None]) -> None:
    texts: list[str] = []
    pipeline = default_pipeline(partition=Partition(groups=1), observer=lambda *told: texts.extend(told[1:3]))
    pipeline.run(unit)
    golden("owners_mlp", f"{pipeline.passes[-1]}\n\n{texts[-2]}\n-> \n\n{texts[-1]}")


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("insert-masks", (InsertMasks(),)),
        (
            "partition{groups=2,strategy=stages},insert-masks",
            (Partition(groups=2, strategy="stages"), InsertMasks()),
        ),
        (" find-weights{ dense = fc*+first , embeddings=true } ", (FindWeights(("fc*", "first"), True),)),
        ("find-weights{min-numel=8}", (FindWeights(min_numel=8),)),
        ("allocate-sparsity{sparsity=0.5,pattern=block:4x1}", (AllocateSparsity(0.5, pattern="block:4x1"),)),
        ("tie-weights{},find-blocks,fold-masks", (TieWeights(), FindBlocks(), FoldMasks())),
        ("", ()),
    ],
)
def test_pipelines_are_read_from_text(text: str, passes: tuple[Pass, ...]) -> None:
    assert parse_pipeline(text).passes == passes


@pytest.mark.parametrize("item", [Partition(2, "by-hand", ("a*", "b|c")), FindWeights(("last",), True, 4)])
def test_a_pass_prints_as_it_is_read(item: Pass) -> None:
    assert parse_pipeline(str(item)).passes == (item,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin", "unknown pass 'partitoin'\n  to do: did you mean 'partition'"),
        ("partition{group=2}", "partition has no option 'group'\n  to do: known: groups, strategy, globs, seed"),
        ("insert-masks{x=1}", "insert-masks has no option 'x'\n  to do: known: none"),
        ("partition{groups=two}", "cannot read 'two' as a whole number\n  where: partition{groups=two}"),
        ("partition{strategy=best}", "strategy='best' is not one of blocks, params, stages, random, by-hand"),
        ("find-weights{embeddings=1}", "cannot read '1' as true or false"),
        ("partition{groups}", "the option 'groups' of partition has no value"),
        ("partition{groups=2", "cannot read the passes from 'partition{groups=2'"),
        ("insert-masks,", "cannot read the passes from 'insert-masks,'"),
        ("insert-masks,;", "cannot read the passes from ';'"),
        ("partition{groups=0}", "groups=0 is not a number of groups"),
        ("allocate-sparsity{sparsity=1}", r"sparsity 1.0 is not in [0, 1)"),
        ("allocate-sparsity{pattern=4:2}", "the pattern '4:2' keeps 4 of 2"),
    ],
)
def test_mistakes_in_the_text_are_explained(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", ["2", 2.0, True, None])
def test_an_option_of_the_wrong_type_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"groups=.* is not a whole number"):
        Partition(groups=value)


def test_a_whole_number_is_also_a_number() -> None:
    assert AllocateSparsity(sparsity=0).sparsity == 0


def test_every_pass_is_registered_under_its_name() -> None:
    assert {name: PASSES[name].name for name in PASSES} == {name: name for name in PASSES}
    names = {
        "tie-weights",
        "find-weights",
        "find-blocks",
        "partition",
        "allocate-sparsity",
        "insert-masks",
        "fold-masks",
    }
    assert names <= set(PASSES)


def test_a_name_belongs_to_one_pass() -> None:
    class Other(Rewrite):
        name: ClassVar[str] = "insert-masks"
        kind: Literal["x"] = "x"

        def apply(self, unit: Unit) -> bool:
            return False

    with pytest.raises(UserError, match=r"two pass entries are called 'insert-masks': .*InsertMasks and .*Other"):
        register(Other)


def test_default_passes_run_in_order() -> None:
    names = [item.name for item in default_pipeline().passes]
    assert names == ["tie-weights", "find-weights", "find-blocks", "partition", "allocate-sparsity", "insert-masks"]


def test_owner_graphs_are_built_only_when_asked_for(unit: Unit) -> None:
    unit.latest(FindWeights)
    assert "owners" not in vars(unit)
    assert all(isinstance(owner.graph, fx.GraphModule) for owner in unit.owners.values())
