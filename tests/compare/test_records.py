"""The file of finished runs: what was written is read back, and what is no record is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gapfx.compare.records import RECORDS, Record, Records
from gapfx.errors import UserError
from gapfx.settings import Settings

RECORD = Record(
    name="gap-0.9-0-epochs",
    settings=dataclasses.asdict(Settings(dense=("first",))),
    metrics={"accuracy": 0.9},
    test={"accuracy": 0.8},
    flops=1e12,
    live_bytes=1e3,
    seconds=2.5,
    epochs=3.0,
    sparsity=0.9,
    versions={"torch": "2.13.0"},
)


def test_records_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    records = Records.read(tmp_path / "new")
    records.add(RECORD)
    records.add(dataclasses.replace(RECORD, name="other"))
    records.add(dataclasses.replace(RECORD, name="other", flops=2e12))
    found = Records.read(tmp_path / "new").found
    assert list(found) == ["gap-0.9-0-epochs", "other"]
    assert found["other"].flops == 2e12
    assert found["gap-0.9-0-epochs"].is_of(Settings(dense=("first",)))
    assert not found["gap-0.9-0-epochs"].is_of(Settings())


def test_settings_that_came_after_a_record_have_their_default_in_it() -> None:
    older = {name: value for name, value in RECORD.settings.items() if name != "lr_scale"}
    record = dataclasses.replace(RECORD, settings=older)
    assert record.is_of(Settings(dense=("first",)))
    assert not record.is_of(Settings(dense=("first",), lr_scale=2.0))


def test_settings_that_the_method_does_not_read_make_no_other_run() -> None:
    shared = dataclasses.replace(RECORD, settings=vars(Settings(method="gmp", update_steps=50)))
    assert shared.is_of(Settings(method="gmp"))
    assert not shared.is_of(Settings(method="rigl"))
    assert not dataclasses.replace(RECORD, settings=vars(Settings(method="rigl", update_steps=50))).is_of(
        Settings(method="rigl")
    )


@pytest.mark.parametrize("line", ["{", "[]", '{"name": "gap"}', "3"])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    Records.read(tmp_path).add(RECORD)
    with (tmp_path / RECORDS).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match="line 2 is no record of a run"):
        Records.read(tmp_path)
