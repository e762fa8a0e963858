"""The translation example: its data, its subwords, its beam search and its groups."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapfx.errors import TaskError
from tests.made_up_pairs import write_pairs
from tests.runs import ROOT, gapfx

TASK = ROOT / "examples" / "translation.py"
Step = Callable[[Tensor, Tensor], Tensor]
ANY_ROWS = torch.tensor([0])


@pytest.fixture(autouse=True)
def corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = write_pairs(tmp_path / "pairs")
    monkeypatch.setenv("TRANSLATION_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def task() -> Any:
    spec = importlib.util.spec_from_file_location("translation_under_test", TASK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_missing_data_is_one_message_that_says_how_to_get_it(
    task: Any, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "val.de").unlink()
    with pytest.raises(TaskError, match=r"there is no val\.de to translate"):
        task.data("train")
    assert gapfx("plan", TASK) == 2
    message = capsys.readouterr().err
    assert "run `python tools/get_data.py translation`" in message
    assert "Traceback" not in message


def test_sides_of_unequal_length_are_refused(task: Any, corpus: Path) -> None:
    with (corpus / "val.de").open("a") as file:
        file.write("mehr\n")
    with pytest.raises(TaskError, match=r"val\.en has 24 lines, and val\.de has 25"):
        task.data("val")


def test_only_a_line_feed_ends_a_sentence(task: Any, corpus: Path) -> None:
    (corpus / "val.en").write_text("the\u2028house\x85.\nthe\rtree.\n", encoding="utf-8", newline="")
    assert task.read_lines(corpus, "val", "en") == ["the\u2028house\x85.", "the\rtree."]


def test_subwords_give_back_every_text_and_are_trained_once(task: Any, corpus: Path) -> None:
    tokenizer = task.subwords(corpus)
    text = "the Öl — grün ☃ house."
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<start>", "<end>")] == [task.PAD, task.START, task.END]
    [path] = corpus.glob("subwords-*")
    before = path.stat().st_mtime_ns
    assert task.subwords(corpus).to_str() == tokenizer.to_str()
    assert path.stat().st_mtime_ns == before
    with (corpus / "train.en").open("a") as file:
        file.write("more\n")
    task.subwords(corpus)
    assert len(list(corpus.glob("subwords-*"))) == 2


def test_pairs_begin_end_and_are_padded_behind(task: Any) -> None:
    source, target = task.collate([task.data("val")[i] for i in range(8)])
    for tokens, has_start in ((source, False), (target, True)):
        ends = (tokens == task.END).int()
        assert ends.sum(1).tolist() == [1] * 8
        assert bool((tokens[:, 0] == task.START).all()) is has_start
        assert torch.equal(tokens == task.PAD, ends.cumsum(1).bool() & ~ends.bool())


def test_only_training_leaves_out_long_pairs(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    num_train, num_val = len(task.data("train")), len(task.data("val"))
    monkeypatch.setattr(task, "MAX_TOKENS", 6)
    assert 0 < len(task.data("train")) < num_train == 400
    assert len(task.data("val")) == num_val == 24


def made_up_model(seed: int, num_tokens: int = 5, length: int = 4) -> Step:
    """Log-probabilities that depend on the last token and the place."""
    table = torch.randn(length, num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed)).mul(2)

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        return table[tokens.shape[1] - 1, tokens[:, -1]].log_softmax(-1)

    return step


def score(task: Any, step: Step, tokens: list[int]) -> float:
    total = sum(float(step(torch.tensor([tokens[:i]]), ANY_ROWS)[0, tokens[i]]) for i in range(1, len(tokens)))
    return total / (len(tokens) - 1) ** task.LENGTH_PENALTY


def all_sequences(task: Any, num_tokens: int, length: int) -> list[list[int]]:
    """What may be said: ordinary tokens up to END or up to the length."""
    ordinary, found = range(3, num_tokens), list[list[int]]()
    for size in range(length + 1):
        for body in itertools.product(ordinary, repeat=size):
            found.append([task.START, *body] + ([task.END] if size < length else []))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_wide_beam_finds_the_best_sequence(task: Any, seed: int) -> None:
    step, start = made_up_model(seed), torch.full((1, 1), task.START)
    best = max(all_sequences(task, 5, 4), key=lambda tokens: score(task, step, tokens))
    found = task.beam_search(step, start, torch.tensor([4]), 40)[0].tolist()
    assert [token for token in found if token != task.PAD] == best


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(task: Any, seed: int) -> None:
    step, tokens = made_up_model(seed), [task.START]
    while len(tokens) < 5 and tokens[-1] != task.END:
        scores = step(torch.tensor([tokens]), ANY_ROWS)[0]
        scores[[task.PAD, task.START]] = -torch.inf
        tokens.append(int(scores.argmax()))
    found = task.beam_search(step, torch.full((1, 1), task.START), torch.tensor([4]), 1)[0].tolist()
    assert found == tokens


def test_each_sentence_of_a_batch_is_searched_by_itself(task: Any) -> None:
    tables = [made_up_model(seed) for seed in range(3)]

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([one(part, rows) for one, part in zip(tables, tokens.chunk(3), strict=True)])

    together = task.beam_search(step, torch.full((3, 1), task.START), torch.tensor([4, 2, 4]), 3)
    for row, one, limit in zip(together.tolist(), tables, (4, 2, 4), strict=True):
        alone = task.beam_search(one, torch.full((1, 1), task.START), torch.tensor([limit]), 3)[0].tolist()
        assert [token for token in row if token != task.PAD] == [token for token in alone if token != task.PAD]


def test_token_by_token_gives_what_the_forward_gives_when_rows_change_places(task: Any) -> None:
    model, target = task.model().eval(), torch.randint(3, 200, (2, 5))
    source = torch.randint(3, 200, (1, 7)).expand(2, 7)
    decoding = task.Decoding(model, source)
    decoding(target[:, :1], torch.tensor([0, 1]))
    decoding(target[:, :2], torch.tensor([0, 1]))
    swapped = torch.cat((target.flip(0)[:, :2], target[:, 2:3]), 1)
    expected = model(source, swapped)[:, -1].log_softmax(-1)
    torch.testing.assert_close(decoding(swapped, torch.tensor([1, 0])), expected, rtol=1e-4, atol=1e-4)


def test_padding_changes_no_result(task: Any) -> None:
    torch.manual_seed(0)
    model = task.model().eval()
    source, target = torch.randint(3, 200, (2, 7)), torch.randint(3, 200, (2, 6))
    source[0, 4:], target[0, 3:] = task.PAD, task.PAD
    with torch.no_grad():
        together, alone = model(source, target)[0, :3], model(source[:1, :4], target[:1, :3])[0]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
        assert task.translate(model, source)[0] == task.translate(model, source[:1, :4])[0]


def test_the_decoder_does_not_see_the_future(task: Any) -> None:
    model = task.model().eval()
    source, target = torch.randint(3, 200, (1, 7)), torch.randint(3, 200, (1, 6))
    changed = target.clone()
    changed[0, 4] += 1
    before, after = model(source, target), model(source, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_the_loss_is_the_mean_over_what_is_not_padded(task: Any) -> None:
    model, batch = task.model().eval(), task.collate([task.data("val")[i] for i in range(4)])
    padded = tuple(torch.nn.functional.pad(side, (0, 5), value=task.PAD) for side in batch)
    torch.testing.assert_close(task.loss(model, batch), task.loss(model, padded), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_big_model_has_the_groups_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--entry", "transformer_big", "--no-calibrate", "--batch-size", 2)
    assert gapfx("plan", TASK, *options, "--groups", 6) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("all 96 176,160,768 ") for line in lines)
    groups = [line.split()[1:4] for line in lines if line.split()[1:2] and line.split()[1].startswith(("enc.", "dec."))]
    assert groups[:6] == [
        ["enc.0-1", "12", "25,165,824"],
        ["enc.2-3", "12", "25,165,824"],
        ["enc.4-5", "12", "25,165,824"],
        ["dec.0-1", "20", "33,554,432"],
        ["dec.2-3", "20", "33,554,432"],
        ["dec.4-5", "20", "33,554,432"],
    ]


@pytest.mark.parametrize("num_groups", [2, 3])
def test_groups_of_the_small_model_follow_the_paper(num_groups: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert gapfx("plan", TASK, "--no-calibrate", "--batch-size", 2, "--groups", num_groups) == 0
    names = [word for word in capsys.readouterr().out.split() if word.startswith(("enc.", "dec."))]
    expected = {2: ["enc.0-2", "dec.0-2"], 3: ["enc.0-1", "enc.2+dec.0", "dec.1-2"]}
    assert names[:num_groups] == expected[num_groups]
