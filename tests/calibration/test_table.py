"""Times of cases: measured, kept on disk, and estimated where there is none."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from gapfx.calibration import Case, Times, answer
from gapfx.calibration.break_evens import expected_gain, is_tall_block
from gapfx.calibration.cache import folder, read_times, write_times
from gapfx.calibration.measure import measure
from gapfx.calibration.table import better
from gapfx.ops.convolution import ConvSettings
from tests.kernels.needs import excuse, needs_kernels

LINEAR = Case((128, 96), (96,), 0.8)
HUGE = '{"times": {"x": [1' + "0" * 400 + ", 2, 3]}}"
SMALL = Case((8, 8), (4,), 0.8)
SETTINGS = tuple(ConvSettings((2, 1), (1, 0), (1, 2), (0, 0), 2).to_ints())
CONVOLUTION = Case((6, 2, 3, 2), (5, 4, 7), 0.5, settings=SETTINGS)


@pytest.fixture(autouse=True)
def an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAPFX_CACHE", str(tmp_path))


def the_file() -> Path:
    [path] = folder().glob("*")
    return path


def test_the_input_of_a_convolution_gives_its_output() -> None:
    given = ConvSettings.from_ints(SETTINGS)
    x, weight = torch.randn(CONVOLUTION.input_shape), torch.randn(CONVOLUTION.shape)
    out = torch.nn.functional.conv2d(x, weight, None, given.stride, given.padding, given.dilation, given.groups)
    assert out.shape == (5, 6, 4, 7)
    assert CONVOLUTION.positions == 5 * 4 * 7


@pytest.mark.parametrize("case", [LINEAR, CONVOLUTION, Case((32, 16), (9,), 0.75, "block:4x1", dtype="bf16")])
def test_every_way_of_a_case_is_timed(case: Case) -> None:
    before = torch.get_rng_state()
    times = measure(case, seconds=0.01)
    assert times.dense > 0
    assert times.expand > 0
    assert (times.sparse is None) == bool(excuse())
    assert torch.equal(torch.get_rng_state(), before)


@needs_kernels
def test_what_was_measured_is_kept_and_not_measured_again() -> None:
    first = answer([LINEAR])
    assert first.measured == {LINEAR}
    assert read_times().times == {LINEAR.key(): first.times[LINEAR]}
    assert answer([LINEAR]).times == first.times
    assert json.loads(the_file().read_text())["setting"]["threads"] == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"times": {"x": [1, 2]}}', '{"times": {"x": [1, -2, 3]}}', HUGE])
def test_a_damaged_file_is_measured_again_with_a_note(text: str) -> None:
    assert write_times({"x": Times(1, 2, 3)}) == ""
    the_file().write_text(text)
    assert read_times().times == {}
    assert "measured again" in answer([SMALL]).notes[0]
    assert write_times({"x": Times(1, 2, None)}) == ""
    assert read_times().times == {"x": Times(1, 2, None)}


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAPFX_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in write_times({"x": Times(1, 2, 3)})


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAPFX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert folder() == Path("/somewhere/gapfx")


def test_without_a_home_the_cache_is_among_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GAPFX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert folder() == tmp_path / "gapfx"


def test_a_full_disk_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "cannot be written" in write_times({"x": Times(1, 2, 3)})
    assert list(folder().iterdir()) == []


@needs_kernels
def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = Case((256, 256), (512,), 0.8)

    def stopped(case: Case) -> Times:
        if case == LINEAR:
            raise KeyboardInterrupt
        return Times(3, 2, 1)

    monkeypatch.setattr("gapfx.calibration.table.measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        answer([LINEAR, heavy])
    assert read_times().times == {heavy.key(): Times(3, 2, 1)}


@needs_kernels
def test_the_time_limit_leaves_the_lightest_cases_to_stored_figures() -> None:
    heavy = Case((256, 256), (512,), 0.8)
    found = answer([LINEAR, heavy], limit_seconds=0.0)
    assert found.measured == set()
    assert "2 of 2 shapes were not measured" in found.notes[-1]


@needs_kernels
def test_no_case_is_begun_that_may_take_longer_than_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(case: Case) -> Times:
        time.sleep(0.3)
        return Times(3, 2, 1)

    monkeypatch.setattr("gapfx.calibration.table.measure", slowly)
    heavy = Case((256, 256), (512,), 0.8)
    assert answer([LINEAR, heavy], limit_seconds=0.5).measured == {heavy}


def test_nothing_is_measured_when_told_so() -> None:
    found = answer([LINEAR, CONVOLUTION, SMALL], calibrate=False)
    assert found.measured == set()
    assert not list(folder().glob("*"))
    assert better(found.times[SMALL]) == "expand"


def test_stored_gains_grow_with_sparsity_and_blocks_and_need_the_instructions() -> None:
    cases = [Case((768, 768), (512,), sparsity) for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95)]
    gains = [expected_gain(case, has_instructions=True) for case in cases]
    assert gains == sorted(gains)
    assert expected_gain(Case((768, 768), (8,), 0.9), has_instructions=True) == 0
    assert expected_gain(cases[2], has_instructions=False) == 0
    tall = Case((768, 768), (512,), 0.8, "block:4x1")
    assert expected_gain(tall, has_instructions=True) > gains[2]
    assert [is_tall_block(text) for text in ("block:4x1", "block:16x1", "block:1x4", "2:4")] == [
        True,
        True,
        False,
        False,
    ]


def test_a_kernel_has_to_win_clearly() -> None:
    assert better(Times(1, 1, 0.9)) == "sparse"
    assert better(Times(1, 1, 0.97)) == "expand"
    assert better(Times(1, 1, None)) == "expand"
