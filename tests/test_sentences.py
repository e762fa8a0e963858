"""The example of sentences: its points, how they are judged, and what its tool makes of packages."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gapfx.errors import TaskError, UserError
from tests.runs import ROOT, gapfx
from tests.task_files import load
from tools.sources.minilm import MODEL_FILES, check_lines, lee, model_files
from tools.sources.wikipedia import lines_by_split, neighbours, paragraphs, split_of_page

TASK = ROOT / "examples" / "sentences.py"
MARKUP = """{{Infobox|a={{b}}|c=d}}
'''Oak''' is a [[tree|kind of tree]] that is found in [[Europe]].<ref name="x">{{cite|A book.}}</ref> It grows in
[[File:Oak.jpg|thumb|An [[oak]] here]]The wood of it is <i>hard</i>.<!-- No. -->
== Heading ==
* An item of a list is left out.
{| class="t"
| Cell || Cell
|}
Oaks have [http://example.org lobed leaves].<ref name="y" /> They fall late."""


@pytest.fixture(autouse=True)
def _no_folder(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.delenv("MINILM_DIR", raising=False)


@pytest.fixture(scope="module")
def task() -> Any:
    return load("examples/sentences.py")


def test_padding_and_company_change_no_point(task: Any) -> None:
    model, tokens = task.dense_model(), task.Tokens(32)(["Here is a longer line.", "short"])
    with torch.no_grad():
        together = task.embed(model, task.padded(tokens))
        alone = task.embed(model, tokens[1][None])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(task.all_points(model, tokens), together, rtol=1e-4, atol=1e-5)


def test_the_dense_model_is_at_its_own_points_and_another_is_not(task: Any) -> None:
    data = task.data("val")
    loader = [task.collate([data[i] for i in range(first, first + 8)]) for first in range(0, len(data), 8)]
    own, other = task.dense_model(), task.dense_model()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(20)
        found, less = task.evaluate(own, loader), task.evaluate(other, loader)
    assert found["loss"] == pytest.approx(0, abs=1e-5)
    assert found["fidelity"] == pytest.approx(1, abs=1e-3)
    assert less["fidelity"] < 0.995
    assert "human" not in found


def test_the_second_sentence_is_looked_for_among_all(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points by hand: one first sentence is nearest to its second, the other to that of the first."""
    points = torch.tensor([[1.0, 0], [1, 0], [0.8, 0.6], [0, 1]])
    monkeypatch.setattr(task, "embed", lambda model, tokens: points)
    found = task.evaluate(torch.nn.Identity(), [(torch.ones(4, 1), points)])
    assert found == {"retrieval": 0.5, "mrr": 0.75, "fidelity": pytest.approx(1), "loss": pytest.approx(0, abs=1e-6)}


def test_equal_values_share_a_place(task: Any) -> None:
    assert task.places(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_splits_of_the_small_text_share_no_line(task: Any) -> None:
    texts = [{text for line in task.lines_of(split) for text in line} for split in ("train", "val", "test")]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def small_folder(task: Any, folder: Path) -> Path:
    """A model, a tokenizer and text as the tool writes them, in small."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[UNK]": 1, "oak": 2, "is": 3, "a": 4, "tree": 5}
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, **words}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(task.tiny().to_dict()))
    own = task.dense_model().state_dict()
    save_file({**own, "embeddings.position_ids": torch.arange(512)[None]}, folder / "model.safetensors")
    (folder / "train.txt").write_text("oak is a tree\na tree is oak\n" * 20)
    for split in ("val", "test"):
        (folder / f"{split}.txt").write_text("oak is a tree\tis a tree oak\ntree is a\ta oak\n")
    (folder / "lee.txt").write_text("oak\ntree is\na tree\n")
    (folder / "lee-similarities.txt").write_text("1 0.2 0.5\n0 1 0.7\n0 0 1\n")
    return folder


def test_points_of_a_folder_are_made_once_and_anew_for_another_text(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILM_DIR", str(small_folder(task, tmp_path)))
    first = task.data("train")
    [path] = tmp_path.glob("points-*")
    path_time = path.stat().st_mtime_ns
    assert torch.equal(task.data("train").points, first.points)
    assert path.stat().st_mtime_ns == path_time
    (tmp_path / "train.txt").write_text("oak oak\n")
    assert len(task.data("train")) == 1
    assert len(list(tmp_path.glob("points-*"))) == 2


def test_the_weights_of_a_folder_are_pruned_and_people_are_asked(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILM_DIR", str(small_folder(task, tmp_path)))
    flags = ("--init", tmp_path / "model.safetensors", "--method", "oneshot", "--no-calibrate", "--lr-scale", 0)
    flags += ("--phase-epochs", 0.5, "--finetune-epochs", 0)
    assert gapfx("sparsify", TASK, "--out", tmp_path / "run", "--sparsity", 0.1, *flags) == 0
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["final"]
    assert found["human"] <= 1
    assert found["fidelity"] > 0.5
    assert found["loss"] < 0.1


def test_an_incomplete_folder_is_one_message(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINILM_DIR", str(tmp_path))
    with pytest.raises(TaskError, match=r"there is no model\.safetensors in \$MINILM_DIR"):
        task.model()
    assert gapfx("plan", TASK) == 2
    assert "tools/get_data.py minilm" in capsys.readouterr().err


def test_prose_is_told_from_markup() -> None:
    assert list(paragraphs(MARKUP)) == [
        "Oak is a kind of tree that is found in Europe. It grows in",
        "The wood of it is hard.",
        "Oaks have lobed leaves. They fall late.",
    ]


def test_neighbours_follow_each_other_directly_and_are_in_one_pair() -> None:
    texts = [f"This is sentence number {number} of the text." for number in ("one", "two", "three", "four", "five")]
    assert list(neighbours(" ".join(texts))) == [(texts[0], texts[1]), (texts[2], texts[3])]
    broken = " ".join([texts[0], "Short one.", texts[1], texts[2]])
    assert list(neighbours(broken)) == [(texts[1], texts[2])]


def test_all_of_a_page_is_in_one_split() -> None:
    page = "<page><title>{0}</title><text>Here is the page {0} for all. It was written by {0} alone.</text></page>"
    titles = [f"T{number}" for number in range(64)]
    found = lines_by_split("\n".join(page.format(title) for title in titles))
    for title in titles:
        split = split_of_page(title)
        holding = [name for name, lines in found.items() if any(f" {title} " in line for line in lines)]
        assert holding == [split]
    assert all(line.count("\t") == (split != "train") for split, lines in found.items() for line in lines)
    assert len(found["train"]) > len(found["test"]) > len(found["val"]) > 0


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, r"the package holds no /model/model\.safetensors"),
        ({f"x/model/{name}": b"short" for name in MODEL_FILES}, r"at least 80,000,000 bytes of model\.safetensors"),
    ],
)
def test_a_package_without_the_model_is_refused(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        model_files(wheel(tmp_path / "a.whl", members))


def test_a_text_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="at least 5,000 lines of text for train, got 1"):
        check_lines({"train": ["a"], "val": [], "test": []})


def test_similarities_are_a_square_over_the_documents(tmp_path: Path) -> None:
    square = "\n".join("\t".join(["0.5"] * 50) for _ in range(50)).encode()
    texts = "\n".join(f"caf\xe9 {number}" for number in range(50)).encode("latin1")
    names = ("g/test_data/lee.cor", "g/test_data/similarities0-1.txt")
    found = lee(wheel(tmp_path / "a.whl", dict(zip(names, (texts, square), strict=True))))
    assert found["lee.txt"].decode().splitlines()[7] == "café 7"
    with pytest.raises(UserError, match="expected 50 documents and a square"):
        lee(wheel(tmp_path / "b.whl", dict(zip(names, (texts, square[:-8]), strict=True))))
