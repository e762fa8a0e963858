"""What a user's DeepSpeed file adds, what it must agree with, and what is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapfx.errors import UserError
from gapfx.runtime.deepspeed_config import (
    FLAGS,
    REFUSED,
    check_deepspeed,
    deepspeed_config,
    own_config,
    read_deepspeed_file,
    without_flags,
)
from gapfx.runtime.engine import EngineOptions
from tests.runs import TASK, assert_same_bits, gapfx

OWN = own_config(micro_batch=4, accumulation=2, world_size=2, clip=1.0, dtype="bf16", stage=2)


def test_without_a_file_the_own_configuration_stands() -> None:
    assert deepspeed_config(OWN, {}) == OWN
    assert OWN["train_batch_size"] == 16
    assert OWN["zero_optimization"]["memory_efficient_linear"] is False


def test_what_the_file_adds_is_there_and_the_rest_stays() -> None:
    given = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "stage": 2}, "wall_clock_breakdown": True}
    made = deepspeed_config(OWN, given)
    assert made["zero_optimization"] == {**OWN["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    assert made["wall_clock_breakdown"] is True
    assert {key: made[key] for key in OWN if key != "zero_optimization"} == {
        key: OWN[key] for key in OWN if key != "zero_optimization"
    }


def test_auto_leaves_it_to_gapfx() -> None:
    given = {name: "auto" for name in OWN if "batch" in name or "gradient" in name}
    assert deepspeed_config(OWN, {**given, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto"}}) == OWN


@pytest.mark.parametrize("name", FLAGS)
def test_what_a_flag_decides_must_agree(name: str) -> None:
    def nested(value: Any) -> dict[str, Any]:
        outer, _, inner = name.partition(".")
        return {outer: {inner: value}} if inner else {outer: value}

    with pytest.raises(UserError, match=f"the DeepSpeed file says {name}.*, this run") as caught:
        deepspeed_config(OWN, nested(77))
    assert FLAGS[name] in str(caught.value)
    outer, _, inner = name.partition(".")
    same = OWN[outer][inner] if inner else OWN[outer]
    assert deepspeed_config(OWN, nested(same)) == OWN


@pytest.mark.parametrize("value", [True, {"enabled": True}])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason(name: str, value: Any, tmp_path: Path) -> None:
    for key in reversed(name.split(".")):
        value = {key: value}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(path)
    assert str(caught.value).startswith(f"DeepSpeed's {name} cannot be used: {REFUSED[name]}")
    assert f"where: {path}" in str(caught.value)


@pytest.mark.parametrize("off", [False, None, {"enabled": False}, {"enabled": False, "loss_scale": 0}, {}, "auto"])
def test_what_is_switched_off_is_no_reason_to_refuse(off: object) -> None:
    check_deepspeed({"fp16": off, "zero_optimization": {"zero_quantized_weights": False}}, "here")


def test_a_second_partition_of_one_rank_is_none() -> None:
    check_deepspeed({"zero_optimization": {"zero_hpz_partition_size": 1, "mics_shard_size": -1}}, "here")
    with pytest.raises(UserError, match="zero_hpz_partition_size cannot be used"):
        check_deepspeed({"zero_optimization": {"zero_hpz_partition_size": 2}}, "here")


def test_a_name_that_deepspeed_would_ignore_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(UserError, match="gradient_cliping is no setting of DeepSpeed") as caught:
        check_deepspeed({"gradient_cliping": 0.5}, "here")
    assert "write gradient_clipping, or take out gradient_cliping" in str(caught.value)


@pytest.mark.parametrize("kind", ["offload_param", "offload_optimizer"])
def test_only_the_cpu_takes_what_is_offloaded(kind: str) -> None:
    check_deepspeed({"zero_optimization": {kind: {"device": "cpu"}}}, "here")
    with pytest.raises(UserError, match=f"{kind} to nvme cannot be used"):
        check_deepspeed({"zero_optimization": {kind: {"device": "nvme"}}}, "here")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "3"])
def test_a_file_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"ds\.json"):
        read_deepspeed_file(path)


def test_the_same_content_is_the_same_text(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('{"steps_per_print": 1,\n "data_types": {"d": 2, "c": 3}}')
    other.write_text('{"data_types": {"c": 3, "d": 2}, "steps_per_print": 1}')
    text = '{"data_types":{"c":3,"d":2},"steps_per_print":1}'
    assert read_deepspeed_file(one) == read_deepspeed_file(other) == text


def test_a_file_that_agrees_for_all_ranks_serves_a_team_of_some_of_them() -> None:
    file = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}
    of_all = EngineOptions(8, 2, deepspeed=file)
    assert of_all.config(2)["gradient_accumulation_steps"] == 2
    of_one = of_all.among(1, 2).config(1)
    assert (of_one["gradient_accumulation_steps"], of_one["train_batch_size"]) == (4, 32)
    assert of_all.among(2, 2) is of_all


def test_what_flags_decide_is_no_part_of_what_a_file_adds_to_another_engine() -> None:
    file = {**OWN, "wall_clock_breakdown": True, "bf16": {"enabled": True, "check_grad_overflow": True}}
    left = without_flags(file)
    assert left["bf16"] == {"check_grad_overflow": True}
    assert left["zero_optimization"] == {k: v for k, v in OWN["zero_optimization"].items() if k != "stage"}
    assert left["wall_clock_breakdown"] is True
    assert not left.keys() & FLAGS.keys()
    assert deepspeed_config(OWN, left) == deepspeed_config(OWN, file)


AGREES = {
    "gradient of dense weights": ("rigl", {"gradient_clipping": 1.0}, ("--clip", 1.0, "--update-steps", 8)),
    "gradient at the start": ("snip", {"gradient_clipping": 0.5}, ("--clip", 0.5)),
    "evaluation in fp32": (
        "gap",
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
        ("--zero", 3, "--dtype", "bf16"),
    ),
}


@pytest.mark.parametrize(("method", "file", "flags"), AGREES.values(), ids=AGREES)
def test_a_file_that_agrees_with_the_flags_changes_no_bit_of_a_run(
    method: str, file: dict[str, Any], flags: tuple[object, ...], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(file))
    run = ("--method", method, "--phase-epochs", 0.25, "--rounds", 1, "--finetune-epochs", 0.5, *flags)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "plain", *run) == 0
    assert gapfx("sparsify", TASK, "--out", tmp_path / "file", *run, "--deepspeed", path) == 0
    assert_same_bits(tmp_path / "file", tmp_path / "plain")
