"""Plans as text: an exact round trip, and one PlanError for whatever a hand edit can break."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gapfx.errors import PlanError
from gapfx.plan import DenseWeight, Group, OwnerForm, Phase, Plan, Weight

Edit = Callable[[dict[str, Any]], object]
SIZES = st.lists(st.integers(1, 2**40), max_size=5).map(tuple)
INDICES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


def weights() -> st.SearchStrategy[Weight]:
    aliases = st.lists(st.text(), max_size=2).map(tuple)
    return st.builds(Weight, st.text(), SIZES, FLOATS, st.text(), aliases)


def plans() -> st.SearchStrategy[Plan]:
    """Plans of any content, most of them not valid."""
    rules = {"state": st.sampled_from(["reset", "carry"]), "lr": st.sampled_from(["restart", "continue"])}
    phase = st.builds(Phase, st.text(), st.integers(), st.integers(), INDICES, INDICES, st.integers(), **rules)
    group = st.builds(Group, st.text(), st.lists(weights(), max_size=3).map(tuple))
    dense = st.builds(DenseWeight, st.text(), SIZES, st.text())
    items = [st.lists(kind, max_size=3).map(tuple) for kind in (group, dense, phase)]
    forms = st.sampled_from(["forward", "read", "in-place"])
    owners = st.lists(st.builds(OwnerForm, st.text(), st.text(), forms, st.text()), max_size=3).map(tuple)
    return st.builds(Plan, *items, st.text(), FLOATS, *[st.text()] * 4, owners)


def a_plan() -> Plan:
    weights = [Weight(f"layer{i}.weight", (4, 6), 0.75, "2:4" if i else "unstructured") for i in range(3)]
    weights[2] = dataclasses.replace(weights[2], aliases=("head.weight",))
    return Plan(
        groups=(Group("front", (weights[0],)), Group("back", (weights[1], weights[2]))),
        dense=(DenseWeight("embedding.weight", (11, 4), "an embedding"),),
        phases=(Phase("one", 0, 5, (0,), (0,)), Phase("two", 5, 9, (1,), (1,), 0, "carry", "continue")),
        sparsity=0.75,
    )


@given(plans())
def test_parsing_undoes_printing_field_by_field(plan: Plan) -> None:
    text = plan.to_json()
    try:
        back = Plan.from_json(text)
    except PlanError:
        with pytest.raises(PlanError):
            plan.validate()
        return
    assert back == plan
    assert back.to_json() == text


def test_a_valid_plan_survives_json_bit_for_bit(tmp_path: Path) -> None:
    sparsity = math.nextafter(0.1, 1)
    plan = dataclasses.replace(a_plan(), sparsity=sparsity)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    assert Plan.load(path) == plan
    assert Plan.load(path).sparsity.hex() == sparsity.hex()


def test_the_facts_of_a_plan() -> None:
    plan = a_plan()
    assert [weight.fqn for weight in plan.weights()] == ["layer0.weight", "layer1.weight", "layer2.weight"]
    assert plan.group_of() == {"layer0.weight": 0, "layer1.weight": 1, "layer2.weight": 1}
    assert [group.numel for group in plan.groups] == [24, 48]
    assert [phase.num_steps for phase in plan.phases] == [5, 4]
    assert plan.num_steps == 9
    assert Plan(()).num_steps == 0
    assert Weight("scale", (), 0.5).numel == 1


def test_whole_numbers_are_taken_where_a_fraction_is_meant_and_defaults_may_be_left_out() -> None:
    text = '{"groups": [{"name": "g", "weights": [{"fqn": "w", "shape": [2, 3], "sparsity": 0}]}]}'
    plan = Plan.from_json(text)
    assert plan == Plan((Group("g", (Weight("w", (2, 3), 0.0),)),))
    assert isinstance(next(plan.weights()).sparsity, float)


def put(*path: Any) -> Edit:
    """An edit that puts the last item of `path` at the place that the others lead to."""

    def edit(data: Any) -> None:
        *parents, name, value = path
        for parent in parents:
            data = data[parent]
        data[name] = value

    return edit


FIRST = ("groups", 0, "weights", 0)
HAND_EDITS: list[tuple[Edit, str]] = [
    (put("schema_version", 2), "PLAN has schema version 2, this gapfx reads 1\n  to do: make the plan again"),
    (put("schema_version", "1"), "expected int, got '1'\n  where: PLAN.schema_version"),
    (lambda d: d.pop("groups"), "the field 'groups' is missing\n  where: PLAN"),
    (put("group", []), "unknown field 'group'\n  where: PLAN\n  to do: known: groups, dense, phases"),
    (put("groups", {}), "expected a list, got {}\n  where: PLAN.groups"),
    (put("groups", 0, "front"), "expected an object with the fields of a Group, got 'front'\n  where: PLAN.groups[0]"),
    (put("groups", 1, None), "with the fields of a Group, got None\n  where: PLAN.groups[1]"),
    (put("groups", 0, "name", 7), "expected str, got 7\n  where: PLAN.groups[0].name"),
    (put("groups", 0, "weights", []), "a group has no weights\n  where: PLAN: groups[0] (front)"),
    (put(*FIRST, "sparsity", 1), "sparsity 1.0 of layer0.weight is not in [0, 1)\n  where: PLAN: groups[0] (front)"),
    (put(*FIRST, "sparsity", -0.1), "sparsity -0.1 of layer0.weight is not in [0, 1)"),
    (put(*FIRST, "sparsity", math.nan), "expected float, got nan\n  where: PLAN.groups[0].weights[0].sparsity"),
    (put(*FIRST, "sparsity", math.inf), "expected float, got inf"),
    (put(*FIRST, "sparsity", 10**400), "expected float, got 1000000"),
    (put(*FIRST, "sparsity", True), "expected float, got True"),
    (put(*FIRST, "sparsity", "0.9"), "expected float, got '0.9'"),
    (put(*FIRST, "sparsity", None), "expected float, got None"),
    (put(*FIRST, "shape", [4, 0]), "layer0.weight has shape [4, 0]\n  where: PLAN: groups[0] (front)"),
    (put(*FIRST, "shape", [4, -1]), "sizes are positive"),
    (put(*FIRST, "shape", [4.0, 6]), "expected int, got 4.0\n  where: PLAN.groups[0].weights[0].shape[0]"),
    (put(*FIRST, "shape", "46"), "expected a list, got '46'"),
    (put(*FIRST, "fqn", ["layer0.weight"]), "expected str, got ['layer0.weight']"),
    (put(*FIRST, "fqn", "layer1.weight"), "layer1.weight is twice in the plan, in groups 'front' and 'back'"),
    (put("own_sparsity", ["head"]), "there is no weight 'head'\n  where: PLAN: own_sparsity"),
    (put(*FIRST, "aliases", ["head.weight"]), "head.weight is twice in the plan, in groups 'front' and 'back'"),
    (put(*FIRST, "aliases", ["layer0.weight"]), "layer0.weight is twice in the plan, in groups 'front' and 'front'"),
    (put("dense", 0, "reason", 1), "expected str, got 1\n  where: PLAN.dense[0].reason"),
    (put("sparsity", [0.5]), "expected float, got [0.5]\n  where: PLAN.sparsity"),
    (put("phases", 0, "start", 1), "the phase covers steps [1, 5), expected a start of 0 and a later stop"),
    (put("phases", 1, "start", 4), "[4, 9), expected a start of 5 and a later stop\n  where: PLAN: phases[1] (two)"),
    (put("phases", 1, "stop", 5), "[5, 5), expected a start of 5 and a later stop"),
    (put("phases", 1, "stop", 9.5), "expected int, got 9.5\n  where: PLAN.phases[1].stop"),
    (
        put("phases", 1, "grow", [2]),
        "group 2 does not exist\n  where: PLAN: phases[1] (two)\n  to do: there are 2 groups",
    ),
    (put("phases", 0, "prune", [0, -1]), "group -1 does not exist"),
    (put("phases", 0, "prune", [False]), "expected int, got False\n  where: PLAN.phases[0].prune[0]"),
    (
        put("phases", 0, "lr_skip", 1),
        "steps from step 1 of the learning rate's schedule on are not in it\n  where: PLAN: phases[0] (one)",
    ),
    (put("phases", 0, "lr_steps", 1), "steps from step 0 of the learning rate's schedule on are not in it"),
    (put("phases", 0, "depth", 0), "depth 0.0 is not in (0, 1]\n  where: PLAN: phases[0] (one)"),
    (put("phases", 0, "depth", 1.5), "depth 1.5 is not in (0, 1]"),
    (put("phases", 0, "state", "keep"), "'keep' is not one of reset, carry\n  where: PLAN.phases[0].state"),
    (put("phases", 0, "lr", ["restart"]), "['restart'] is not one of restart, continue\n  where: PLAN.phases[0].lr"),
]


@pytest.mark.parametrize(("edit", "message"), HAND_EDITS, ids=[message[:50] for _, message in HAND_EDITS])
def test_a_hand_edit_that_breaks_the_plan_is_named_with_its_place(edit: Edit, message: str) -> None:
    data = json.loads(a_plan().to_json())
    edit(data)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(data), source="PLAN")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "PLAN is not JSON: Expecting value"),
        ("{", "PLAN is not JSON"),
        ("{'groups': []}", "PLAN is not JSON"),
        ("\ufeff{}", "PLAN is not JSON: Unexpected UTF-8 BOM"),
        ("[]", "expected an object with the fields of a Plan, got []"),
        ("null", "expected an object with the fields of a Plan, got None"),
        ("1" * 5000, "PLAN is not JSON: Exceeds the limit"),
        ("[" * 100_000, "PLAN is not JSON: maximum recursion depth exceeded"),
        ('{"groups":' * 100_000, "PLAN is not JSON: maximum recursion depth exceeded"),
        ('{"groups": [], "sparsity": 1e999}', "expected float, got inf"),
    ],
    ids=lambda text: text[:20],
)
def test_text_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, source="PLAN")
    assert message in str(caught.value)


@pytest.mark.parametrize("depth", range(850, 1000, 5))
def test_nesting_close_to_what_python_bears_is_refused_too(depth: int) -> None:
    with pytest.raises(PlanError):
        Plan.from_json('{"groups":' + "[" * depth + "]" * depth + "}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["fqn", "shape", "x"]), inner),
    max_leaves=6,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


@given(st.data(), JSON)
def test_any_value_at_any_place_gives_a_plan_or_a_plan_error(data: st.DataObject, value: Any) -> None:
    edited = copy.deepcopy(json.loads(a_plan().to_json()))
    put(*data.draw(st.sampled_from(places(edited))), value)(edited)
    with contextlib.suppress(PlanError):  # any other exception fails
        Plan.from_json(json.dumps(edited)).validate()


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")))
def test_any_text_gives_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("content", [None, b"\xff\xfe{}"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlanError, match=r"the plan .*plan\.json cannot be read"):
        Plan.load(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.load(tmp_path)


SHAPES = {"layer0.weight": (4, 6), "layer1.weight": (4, 6), "layer2.weight": (4, 6), "head.weight": (4, 6)}


def test_a_prune_that_does_not_go_all_the_way_eases_its_groups_until_the_next_one() -> None:
    groups = tuple(Group(name, (Weight(f"{name}.weight", (10, 10), 0.8),)) for name in ("front", "back"))
    phases = (
        Phase("dense", 0, 1, grow=(0, 1)),
        Phase("half", 1, 2, prune=(0,), depth=0.5),
        Phase("other", 2, 3, prune=(1,)),
        Phase("whole", 3, 4, prune=(0,)),
    )
    plan = Plan(groups, phases=phases)
    found = [[weight.sparsity for weight in plan.eased(index).weights()] for index in range(-1, 4)]
    assert found == [[0.8, 0.8], [0.8, 0.8], [0.4, 0.8], [0.4, 0.8], [0.8, 0.8]]
    assert plan.eased(3) is plan


def test_a_plan_fits_the_model_it_was_made_for() -> None:
    a_plan().check_model({**SHAPES, "other": (1,)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer1.weight": None}, "the plan is for another model: it has no parameter 'layer1.weight'"),
        ({"head.weight": None}, "it has no parameter 'head.weight'"),
        ({"layer0.weight": (6, 4)}, "layer0.weight has shape [6, 4], the plan says [4, 6]"),
        ({"head.weight": (4,)}, "head.weight has shape [4], the plan says [4, 6]"),
    ],
)
def test_a_plan_for_another_model_is_refused(change: dict[str, Any], message: str) -> None:
    shapes = {fqn: shape for fqn, shape in {**SHAPES, **change}.items() if shape is not None}
    with pytest.raises(PlanError) as caught:
        a_plan().check_model(shapes)
    assert message in str(caught.value)


def test_a_plan_from_before_kernels_were_chosen_makes_weights_dense() -> None:
    weight = {"fqn": "a", "shape": [2, 2], "sparsity": 0.5}
    plan = Plan.from_json(json.dumps({"groups": [{"name": "g", "weights": [weight]}]}))
    [read] = plan.weights()
    assert (read.kernel, read.gain, read.positions) == ("expand", 1.0, 0)
    assert Plan.from_json(plan.to_json()) == plan
