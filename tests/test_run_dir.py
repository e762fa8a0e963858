"""The run directory: nothing is written over, and a crash at any moment leaves what can be continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gapfx.errors import UserError
from gapfx.plan import Group, Phase, Plan, Weight
from gapfx.run_dir import RunDir, write_atomically
from gapfx.settings import Settings

PLAN = Plan((Group("g", (Weight("w", (2, 2), 0.5),)),), phases=(Phase("one", 0, 40),))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "deep" / "run")
    made.create(Settings(sparsity=0.75), PLAN, force=False)
    return made


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_a_new_run_holds_its_settings_and_its_plan(run: RunDir) -> None:
    assert set(contents(run.path)) == {"config.json", "plan.json"}
    assert run.settings() == Settings(sparsity=0.75)
    assert run.saved_plan() == PLAN
    assert run.events() == []


def test_an_empty_directory_can_be_taken(tmp_path: Path) -> None:
    RunDir(tmp_path).create(Settings(), PLAN, force=False)
    assert RunDir(tmp_path).settings() == Settings()


def test_a_run_is_never_written_over_without_force(run: RunDir) -> None:
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    before = contents(run.path)
    with pytest.raises(UserError, match=r"already holds a run\n  to do: continue it with --resume, replace it with"):
        run.create(Settings(), PLAN, force=False)
    assert contents(run.path) == before
    assert run.checkpoints.is_dir()


def test_force_replaces_what_gapfx_made_and_keeps_the_rest(run: RunDir) -> None:
    run.metrics.write_text("{}\n")
    run.summary.write_text("{}")
    (run.checkpoints / "step-00000001").mkdir(parents=True)
    (run.path / "notes.txt").write_text("mine")
    run.create(Settings(seed=3), PLAN, force=True)
    assert set(contents(run.path)) == {"config.json", "plan.json", "notes.txt"}
    assert not run.checkpoints.exists()
    assert run.settings().seed == 3


@pytest.mark.parametrize("config", [None, "{}x", "[1]", '{"hidden_size": 768}', '{"sparsity": 2.0}', "\udcff"])
@pytest.mark.parametrize("force", [False, True])
def test_a_directory_that_is_no_run_is_left_alone_even_with_force(
    tmp_path: Path, config: str | None, force: bool
) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"exists and is not a run\n  to do: give another --out; gapfx deletes nothing"):
        RunDir(tmp_path).create(Settings(), PLAN, force=force)
    assert contents(tmp_path) == before


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a run"):
        RunDir(tmp_path / "file").create(Settings(), PLAN, force=True)
    with pytest.raises(UserError, match=r"the run directory cannot be made: .*\n  to do: give another --out"):
        RunDir(tmp_path / "file" / "run").create(Settings(), PLAN, force=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_of_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no run to continue\n  to do: start it without --resume"):
        RunDir(tmp_path).settings()
    assert RunDir(tmp_path).saved_plan() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_damaged_settings_are_named(run: RunDir, text: str) -> None:
    run.config.write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged: "):
        run.settings()


def test_a_run_continues_with_the_settings_that_shape_it(run: RunDir) -> None:
    was = run.settings()
    run.check_resume(was)
    run.check_resume(dataclasses.replace(was, log_every=1, keep_checkpoints=1, nproc=2))
    with pytest.raises(UserError, match=r"started with sparsity 0\.75, not 0\.9\n  where: .*config\.json"):
        run.check_resume(dataclasses.replace(was, sparsity=0.9))


def test_a_run_is_not_continued_with_other_passes(run: RunDir) -> None:
    other = dataclasses.replace(run.settings(), passes="partition{groups=2},insert-masks")
    with pytest.raises(UserError, match=r"started with passes '', not 'partition\{groups=2\},insert-masks'"):
        run.check_resume(other)


def event(kind: str, step: int, **facts: Any) -> dict[str, Any]:
    return {"event": kind, "step": step, **facts}


EVENTS = [
    event("start", 0),
    event("phase", 0),
    event("step", 10),
    event("eval", 10),
    event("checkpoint", 10),
    event("step", 20),
    event("prune", 20),
    event("checkpoint", 20),
    event("phase", 20),
    event("step", 30),
]


def write_events(run: RunDir, events: list[dict[str, Any]], tail: str = "") -> None:
    run.metrics.write_text("".join(json.dumps(item) + "\n" for item in events) + tail)


@pytest.mark.parametrize("tail", ["", '{"event": "st', '{"event": "step", "step": 31', "\0\0\0", "31", "[1]\n", "null"])
@pytest.mark.parametrize(("step", "num_kept"), [(10, 5), (20, 8), (-1, 0)])
def test_metrics_are_cut_after_the_checkpoint(run: RunDir, tail: str, step: int, num_kept: int) -> None:
    write_events(run, EVENTS, tail)
    assert run.events() == EVENTS
    run.rewind_metrics(step)
    assert run.events() == EVENTS[:num_kept]
    assert run.metrics.read_text() == "".join(json.dumps(item) + "\n" for item in EVENTS[:num_kept])


def test_metrics_survive_bytes_that_are_no_text(run: RunDir) -> None:
    write_events(run, EVENTS[:5])
    with run.metrics.open("ab") as file:
        file.write(b"\xff\xfe{")
    run.rewind_metrics(10)
    assert run.events() == EVENTS[:5]


def test_a_crash_before_the_line_of_the_checkpoint_loses_no_metrics(run: RunDir) -> None:
    write_events(run, EVENTS[:7], '{"event": "checkp')
    run.rewind_metrics(20)
    assert run.events() == EVENTS[:7]


def test_without_its_line_later_events_are_still_cut(run: RunDir) -> None:
    later = [event("resume", 20), event("phase", 20), event("step", 30), event("checkpoint", 30)]
    write_events(run, [*EVENTS[:7], *later])
    run.rewind_metrics(20)
    assert run.events() == EVENTS[:7]


def test_a_run_continued_twice_from_one_checkpoint_is_cut_after_its_only_line(run: RunDir) -> None:
    write_events(run, [*EVENTS[:5], event("resume", 10), event("step", 20)])
    run.rewind_metrics(10)
    assert run.events() == EVENTS[:5]


def test_the_memory_of_each_rank_is_the_most_that_any_process_had(run: RunDir) -> None:
    assert run.peaks() == []
    told = [event("checkpoint", 10, peak_rss_bytes_by_rank=peaks) for peaks in ([5, 1], [2, 3, 4], [])]
    write_events(run, [*EVENTS, *told])
    assert run.peaks() == [5, 3, 4]


def test_rewinding_a_run_without_metrics_gives_none(run: RunDir) -> None:
    run.rewind_metrics(10)
    assert run.metrics.read_text() == ""


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert contents(tmp_path) == {"file.json": b"new"}
