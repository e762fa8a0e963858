"""Checkpoints come back bit for bit or not at all, and an older good one is always found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gapfx.errors import CheckpointError
from gapfx.io.container import Entry, write_tensors
from gapfx.masks import pack
from gapfx.runtime import checkpoint
from gapfx.runtime.checkpoint import load_checkpoint, save_checkpoint
from gapfx.runtime.ranks import Peers
from gapfx.runtime.state import OptimizerState, Spread, TrainState, bytes_of
from tests.runtime.threads import at, on_ranks

Damage = Callable[[Path], object]


def state_of(step: int, size: int = 5) -> TrainState:
    """Every kind of content: special numbers, empty and scalar tensors, odd names, a mask that is stored twice."""
    torch.manual_seed(step)
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45])
    mask = torch.rand(size, 8) < 0.4
    bits, live = pack(mask), int(mask.sum())
    layout = {"a.weight": Spread((size, 8)), "odd/name: é": Spread((5,)), "empty": Spread((0, 3)), "one": Spread(())}
    weights = {"a.weight": torch.randn(live), "odd/name: é": special, "empty": torch.zeros(0), "one": torch.ones(1)}
    moments = {"exp_avg": {"a.weight": torch.randn(live)}, "exp_avg_sq": {"a.weight": torch.rand(live)}}
    return TrainState(
        layout,
        weights,
        buffers={"n": torch.tensor(7), "mean": torch.randn(3).bfloat16(), "flag": torch.tensor([True, False])},
        bits={"a.weight": bits},
        lives={"a.weight": (live,)},
        sparse_bits={"a.weight": bits},
        explored={"a.weight": bits | 1},
        optimizer=OptimizerState(moments, [{"step": (3.0, True), "count": (4, False)}, {}]),
        step=step,
    )


def raw(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def assert_equal(one: TrainState, other: TrainState) -> None:
    for table in ("weights", "buffers", "bits", "sparse_bits", "explored"):
        ours, theirs = getattr(one, table), getattr(other, table)
        assert {fqn: raw(t) for fqn, t in ours.items()} == {fqn: raw(t) for fqn, t in theirs.items()}, table
    for state, moments in one.optimizer.moments.items():
        theirs = other.optimizer.moments[state]
        assert {fqn: raw(t) for fqn, t in moments.items()} == {fqn: raw(t) for fqn, t in theirs.items()}, state
    assert one.optimizer.moments.keys() == other.optimizer.moments.keys()
    assert one.optimizer.scalars == other.optimizer.scalars
    assert [type(v) for g in one.optimizer.scalars for pair in g.values() for v in pair] == [
        type(v) for g in other.optimizer.scalars for pair in g.values() for v in pair
    ]
    assert one.step == other.step
    assert one.layout == other.layout


def loaded(directory: Path) -> tuple[TrainState, list[str]]:
    found = load_checkpoint(directory)
    assert found is not None
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, size: int) -> None:
    state = state_of(12, size)
    path = save_checkpoint(tmp_path / "deep" / "checkpoints", state, keep=1)
    assert path.name == "step-00000012"
    assert names(path) == ["manifest.json", "rank-00000.safetensors", "state.json"]
    back, problems = loaded(path.parent)
    assert problems == []
    assert_equal(back, state)


def test_a_state_before_the_first_step_comes_back(tmp_path: Path) -> None:
    state = TrainState({"w": Spread((2, 2))}, {"w": torch.randn(4)})
    save_checkpoint(tmp_path, state, keep=1)
    assert_equal(loaded(tmp_path)[0], state)


def test_what_is_read_does_not_change_with_what_was_saved(tmp_path: Path) -> None:
    state = state_of(1)
    save_checkpoint(tmp_path, state, keep=1)
    back, _ = loaded(tmp_path)
    back.weights["a.weight"].zero_()
    back.bits["a.weight"].zero_()
    assert back.sparse_bits["a.weight"].any()
    assert_equal(loaded(tmp_path)[0], state)


def test_weights_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.randn(24)
    layout = {"half": Spread((12,)), "whole": Spread((24,))}
    state = TrainState(layout, {"half": base[::2], "whole": base})
    save_checkpoint(tmp_path, state, keep=1)
    assert_equal(loaded(tmp_path)[0], state)


def test_the_newest_is_read_and_the_oldest_are_deleted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, state_of(step), keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    assert loaded(tmp_path)[0].step == 40


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, state_of(step), keep=2)
    assert loaded(tmp_path)[0].step == 100_000_000
    save_checkpoint(tmp_path, state_of(100_000_001), keep=2)
    assert names(tmp_path) == ["step-100000000", "step-100000001"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(10), keep=2)
    other = dataclasses.replace(state_of(11), step=10)
    save_checkpoint(tmp_path, other, keep=2)
    assert_equal(loaded(tmp_path)[0], other)


def flip(name: str, at: int) -> Damage:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[at] ^= 1
        (path / name).write_bytes(content)

    return damage


def tear(name: str) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-10])


def forge(text: str) -> Damage:
    return lambda path: (path / "manifest.json").write_text(text)


def empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def other_format(path: Path) -> None:
    """A whole checkpoint of a later gapfx."""
    facts = json.loads((path / "state.json").read_text()) | {"format": 9}
    (path / "state.json").write_text(json.dumps(facts))
    manifest = json.loads((path / "manifest.json").read_text())
    raw = (path / "state.json").read_bytes()
    manifest["state.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "flipped weight": (flip("rank-00000.safetensors", -1), "rank-00000.safetensors does not match its SHA-256"),
    "flipped header": (flip("rank-00000.safetensors", 0), "rank-00000.safetensors does not match its SHA-256"),
    "flipped facts": (flip("state.json", 5), "state.json does not match its SHA-256"),
    "torn weights": (tear("rank-00000.safetensors"), "bytes, the manifest says"),
    "torn facts": (tear("state.json"), "bytes, the manifest says"),
    "torn manifest": (tear("manifest.json"), "manifest.json|delimiter|Unterminated|Expecting"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "No such file.*manifest.json"),
    "no weights": (lambda path: (path / "rank-00000.safetensors").unlink(), "No such file.*rank-00000.safetensors"),
    "nothing": (empty, "No such file"),
    "empty manifest": (forge("{}"), r"the manifest names \[\]"),
    "manifest is a list": (forge('["state.json", "rank-00000.safetensors"]'), "must be integers"),
    "manifest is null": (forge("null"), "not iterable"),
    "manifest of numbers": (forge('{"state.json": 1, "rank-00000.safetensors": 2}'), "not subscriptable"),
    "manifest leaves the directory": (forge('{"../x": {}, "state.json": {}}'), r"\.\./x"),
    "later format": (other_format, "it has format 9, this gapfx reads 3"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path: Path, damage: Damage, reason: str) -> None:
    good = state_of(10)
    save_checkpoint(tmp_path, good, keep=3)
    damage(save_checkpoint(tmp_path, state_of(20), keep=3))
    back, problems = loaded(tmp_path)
    assert_equal(back, good)
    assert len(problems) == 1
    assert problems[0].startswith("step-00000020 is damaged: ")
    assert re.search(reason, problems[0])


def test_when_none_is_whole_every_reason_is_given(tmp_path: Path) -> None:
    for step in (10, 20):
        tear("state.json")(save_checkpoint(tmp_path, state_of(step), keep=3))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path)
    assert str(caught.value).index("step-00000020 is damaged") < str(caught.value).index("step-00000010 is damaged")
    assert "restore a checkpoint from a backup, or start again with --force" in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: (path / "x").mkdir(parents=True)]
)
def test_a_run_without_checkpoints_has_none(tmp_path: Path, make: Damage) -> None:
    make(tmp_path / "checkpoints")
    assert load_checkpoint(tmp_path / "checkpoints") is None


def test_a_run_that_fell_back_keeps_its_new_checkpoint_and_not_the_damaged_later_one(tmp_path: Path) -> None:
    for step in (10, 20, 40):
        path = save_checkpoint(tmp_path, state_of(step), keep=3)
    tear("state.json")(path)
    assert loaded(tmp_path)[0].step == 20
    save_checkpoint(tmp_path, state_of(30), keep=1)
    assert names(tmp_path) == ["step-00000030"]
    assert loaded(tmp_path)[0].step == 30


def test_what_a_killed_writer_left_is_not_read_and_is_cleared_away(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(10), keep=3)
    (tmp_path / "step-00000010").rename(tmp_path / ".writing-00000010")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, state_of(20), keep=3)
    assert names(tmp_path) == ["step-00000020"]


def test_what_a_killed_writer_moved_aside_is_put_back_until_its_place_is_taken(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state_of(10), keep=1)
    (tmp_path / "step-00000010").rename(tmp_path / ".replaced-step-00000010")
    assert_equal(loaded(tmp_path)[0], state_of(10))
    (tmp_path / ".replaced-step-00000010").mkdir()
    assert_equal(loaded(tmp_path)[0], state_of(10))
    assert names(tmp_path) == ["step-00000010"]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, state_of(10), keep=1)
    assert all(b"\x80\x02" not in (path / name).read_bytes()[:64] for name in names(path))
    assert json.loads((path / "state.json").read_text())["step"] == 10


FULL_DISK = """
import resource, sys
from pathlib import Path
from gapfx.errors import CheckpointError
from gapfx.runtime import checkpoint
from gapfx.runtime.checkpoint import load_checkpoint, save_checkpoint
from tests.runtime.test_checkpoint import state_of

directory = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    save_checkpoint(directory, state_of(20, size=4000), keep=1)
except CheckpointError as error:
    print(error)
print("newest", load_checkpoint(directory)[0].step, sorted(path.name for path in directory.iterdir()))
"""


@pytest.mark.parametrize("limit_bytes", [0, 100, 100_000])
def test_a_full_disk_is_a_checkpoint_error_and_older_ones_stay(tmp_path: Path, limit_bytes: int) -> None:
    good = state_of(10)
    save_checkpoint(tmp_path, good, keep=1)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit_bytes)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    assert "the checkpoint of step 20 could not be written: " in result.stdout
    assert "free disk space and continue with --resume; older checkpoints are untouched" in result.stdout
    assert result.stdout.endswith("newest 10 ['step-00000010']\n")
    assert_equal(loaded(tmp_path)[0], good)


def test_a_directory_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match="the checkpoint of step 10 could not be written"):
        save_checkpoint(tmp_path / "checkpoints", state_of(10), keep=1)


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    state = state_of(12, 13)
    on_ranks(writers, lambda peers: save_checkpoint(tmp_path, at(peers, state), keep=1))
    path = tmp_path / "step-00000012"
    assert len(list(path.glob("rank-*.safetensors"))) == writers

    def read(peers: Peers) -> TrainState:
        found = load_checkpoint(tmp_path, peers)
        assert found is not None
        assert found[1] == []
        return found[0]

    for rank, back in enumerate(on_ranks(readers, read)):
        mine = at(Peers(rank, readers), state)
        assert_equal(back, mine)
        assert (back.peers.rank, back.peers.size) == (rank, readers)
        assert torch.equal(back.sparse_bits["a.weight"], bytes_of(state.bits["a.weight"], *mine.bounds("a.weight")))


def test_one_file_that_is_damaged_makes_all_ranks_fall_back(tmp_path: Path) -> None:
    for step in (10, 20):
        on_ranks(3, lambda peers, step=step: save_checkpoint(tmp_path, at(peers, state_of(step, 40)), keep=2))
    flip("rank-00002.safetensors", -1)(tmp_path / "step-00000020")
    found = on_ranks(2, lambda peers: load_checkpoint(tmp_path, peers))
    assert [(state.step, problems) for state, problems in filter(None, found)] == [
        (10, ["step-00000020 is damaged: rank-00002.safetensors does not match its SHA-256"])
    ] * 2


def test_a_rank_that_cannot_write_is_the_error_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(2, lambda peers: save_checkpoint(tmp_path, at(peers, state_of(10)), keep=1))

    def full(path: Path, entries: Iterable[Entry]) -> None:
        if "rank-00001" in path.name:
            raise OSError("no space on rank 1")
        write_tensors(path, entries)

    def save(peers: Peers) -> str:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(tmp_path, at(peers, dataclasses.replace(state_of(10), step=20)), keep=1)
        return str(caught.value)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    messages = on_ranks(2, save)
    assert "no space on rank 1" in messages[0]
    assert messages[0] == messages[1]
    assert names(tmp_path) == ["step-00000010"]
    assert loaded(tmp_path)[0].step == 10


def test_slices_that_do_not_fit_their_masks_are_found(tmp_path: Path) -> None:
    state = state_of(10)
    state.weights["a.weight"] = torch.zeros(state.weights["a.weight"].numel() + 1)
    save_checkpoint(tmp_path, state, keep=1)
    with pytest.raises(CheckpointError, match=r"weights of a.weight has \[\d+\] values in a slice, \d+ are live"):
        load_checkpoint(tmp_path)
