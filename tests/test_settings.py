"""Layers of settings: which one wins, and what a wrong value says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gapfx.errors import UserError
from gapfx.settings import Settings, flag, merge


def test_later_layers_win_and_none_is_not_given() -> None:
    settings = merge(
        ("the task", {"sparsity": 0.5, "groups": 3, "dense": ["head"]}),
        ("the command line", {"sparsity": 0.8, "groups": None, "rounds": 2}),
    )
    assert settings == Settings(sparsity=0.8, groups=3, dense=("head",), rounds=2)


def test_no_layer_gives_the_defaults_and_they_are_valid() -> None:
    Settings().validate()
    assert merge() == merge(("the task", {})) == Settings()


def test_settings_survive_json() -> None:
    settings = Settings(groups=3, partition="by-hand", group=("a.*", "b"), phase_epochs=0.5, prune_embeddings=True)
    assert merge(("config.json", json.loads(settings.to_json()))) == settings
    assert list(json.loads(settings.to_json())) == [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"sparsity": 0}, "sparsity", 0.0),
        ({"groups": "4"}, "groups", 4),
        ({"groups": "auto"}, "groups", "auto"),
        ({"group": ["a", "b"]}, "partition", "by-hand"),
        ({"dense": ()}, "dense", ()),
        ({"dtype": "bf16"}, "dtype", "bf16"),
    ],
)
def test_values_are_taken_in_the_types_in_which_people_write_them(
    given: dict[str, Any], name: str, value: object
) -> None:
    found = getattr(merge(("the task", given)), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsty": 0.5}, "unknown setting 'sparsty'\n  where: the task\n  to do: did you mean 'sparsity'? known: "),
        ({3: 0.5}, "unknown setting 3\n  where: the task"),
        ({"sparsity": "0.5"}, "sparsity is '0.5', expected a number\n  where: the task\n  to do: change --sparsity"),
        ({"sparsity": True}, "sparsity is True, expected a number"),
        ({"sparsity": float("nan")}, "sparsity is nan, expected a number"),
        ({"clip": float("inf")}, "clip is inf, expected a number"),
        ({"clip": 10**400}, "expected a number"),
        ({"rounds": 1.0}, "rounds is 1.0, expected a whole number"),
        ({"rounds": True}, "rounds is True, expected a whole number"),
        ({"groups": "many"}, "groups is 'many', expected a whole number or auto"),
        ({"groups": "-1"}, "groups is '-1', expected a whole number or auto"),
        ({"groups": True}, "groups is True"),
        ({"groups": 2.0}, "groups is 2.0"),
        ({"dtype": "fp16"}, "dtype is 'fp16', expected one of fp32, bf16"),
        ({"dtype": ["fp32"]}, "expected one of fp32, bf16"),
        ({"form": "packed"}, "form is 'packed', expected one of masked, compact"),
        ({"dense": "head"}, "dense is 'head', expected a list of texts"),
        ({"dense": [1]}, "dense is [1], expected a list of texts"),
        ({"prune_embeddings": 1}, "prune_embeddings is 1, expected true or false\n"),
        ({"pattern": 24}, "pattern is 24, expected a text"),
    ],
)
def test_a_wrong_name_or_type_names_its_layer(given: dict[Any, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merge(("the defaults", {}), ("the task", given), ("the command line", {}))
    assert message in str(caught.value)
    assert "where: the task" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0 is not in [0, 1)\n  to do: sparsity is the share of zeros"),
        ({"sparsity": -0.1}, "sparsity -0.1 is not in [0, 1)"),
        ({"groups": 0}, "groups is 0, it must be at least 1\n  to do: change --groups"),
        ({"rounds": 0}, "rounds is 0"),
        ({"phase_epochs": -1}, "phase_epochs is -1.0, it must be at least 0\n  to do: change --phase-epochs"),
        ({"finetune_epochs": -1}, "finetune_epochs is -1.0"),
        ({"steps_per_epoch": -1}, "steps_per_epoch is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"clip": -1}, "clip is -1.0"),
        ({"nproc": 0}, "nproc is 0"),
        ({"log_every": 0}, "log_every is 0"),
        ({"eval_epochs": -0.5}, "eval_epochs is -0.5"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"zero": 4}, "there is no ZeRO stage 4"),
        ({"zero": 0, "dtype": "bf16"}, "use --zero 1, which on one process takes no more memory"),
        ({"partition": "by-hand"}, "--group and --partition by-hand go together"),
        ({"partition": "blocks", "group": ["a"]}, "--group and --partition by-hand go together"),
    ],
)
def test_a_value_out_of_its_range_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        merge(("the task", given))
    assert message in str(caught.value)


def test_every_number_has_a_lowest_value_or_a_check_of_its_own() -> None:
    numbers = [f.name for f in dataclasses.fields(Settings) if type(f.default) in (int, float) and f.name != "seed"]
    for name in numbers:
        kind = type(getattr(Settings(), name))
        with pytest.raises(UserError, match=r"is -7|-7\.0 is not|stage -7"):
            merge(("the task", {name: kind(-7)}))


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "expected"),
    [(64, 0, 1, (64, 1)), (64, 0, 4, (16, 1)), (64, 8, 2, (8, 4)), (6, 1, 3, (1, 2))],
)
def test_a_batch_is_micro_batches_over_ranks(
    batch: int, micro: int, world_size: int, expected: tuple[int, int]
) -> None:
    settings = Settings(batch_size=batch, micro_batch=micro)
    assert settings.batches(world_size) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "world_size", "message"),
    [
        (10, 0, 4, "a batch of 10 is no multiple of micro-batches of 2 on 4 ranks"),
        (2, 0, 4, "a batch of 2 is no multiple of micro-batches of 1 on 4 ranks"),
        (8, 3, 1, "a batch of 8 is no multiple of micro-batches of 3 on 1 ranks"),
        (8, 16, 1, "--batch-size is the global batch"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(batch: int, micro: int, world_size: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Settings(batch_size=batch, micro_batch=micro).batches(world_size)
    assert message in str(caught.value)


def test_a_setting_has_a_flag() -> None:
    assert flag("finetune_epochs") == "--finetune-epochs"
