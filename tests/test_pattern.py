"""Which weights a pattern keeps: exact counts, ties, structure, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gapfx.criterion import CRITERIA
from gapfx.errors import UserError
from gapfx.pattern import PATTERNS, Block, NOfM, Pattern, Unstructured, kept_count, parse_pattern, top_mask

SPARSITIES = st.floats(0, 1, exclude_max=True)
# Few distinct values, so that ties are the rule.
VALUES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, float("inf")])


def scores(shape: tuple[int, ...]) -> st.SearchStrategy[Tensor]:
    numel = math.prod(shape)
    return st.lists(VALUES, min_size=numel, max_size=numel).map(lambda flat: torch.tensor(flat).view(shape))


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(SHAPES.flatmap(scores), SPARSITIES)
def test_unstructured_masks_keep_exactly_the_highest_and_the_first_of_equals(score: Tensor, sparsity: float) -> None:
    pattern = Unstructured()
    mask = pattern.mask(score, sparsity)
    assert mask.shape == score.shape
    num_kept = pattern.num_kept(tuple(score.shape), sparsity)
    assert int(mask.sum()) == num_kept == max(1, score.numel() - round(score.numel() * sparsity))
    flat = score.flatten().tolist()
    best = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:num_kept]
    assert mask.flatten().nonzero().flatten().tolist() == sorted(best)


@given(SHAPES.flatmap(scores), SPARSITIES, SPARSITIES)
def test_more_sparsity_keeps_a_subset(score: Tensor, one: float, other: float) -> None:
    low, high = sorted((one, other))
    loose, tight = Unstructured().mask(score, low), Unstructured().mask(score, high)
    assert not bool((tight & ~loose).any())


@given(st.data(), st.integers(2, 5), st.integers(1, 4), st.integers(1, 3))
def test_n_of_m_masks_keep_n_in_every_run_and_the_first_of_equals(data: st.DataObject, m: int, o: int, r: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    score = data.draw(scores((o, r * m)))
    pattern = NOfM(n, m)
    mask = pattern.mask(score, 0.123)
    assert int(mask.sum()) == pattern.num_kept((o, r * m), 0.123) == o * r * n
    for run, kept in zip(score.view(-1, m).tolist(), mask.view(-1, m).tolist(), strict=True):
        best = sorted(range(m), key=lambda i: (-run[i], i))[:n]
        assert [i for i in range(m) if kept[i]] == sorted(best)


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), SPARSITIES)
def test_block_masks_are_uniform_in_each_block_with_the_exact_count(
    data: st.DataObject, rows: int, columns: int, outs: int, ins: int, sparsity: float
) -> None:
    shape = (outs * rows, ins * columns)
    score = data.draw(scores(shape)).clamp(max=4)
    pattern = Block(rows, columns)
    mask = pattern.mask(score, sparsity)
    blocks = mask.view(outs, rows, ins, columns).transpose(1, 2).reshape(outs * ins, rows * columns)
    assert torch.equal(blocks.all(1), blocks.any(1))
    assert int(mask.sum()) == pattern.num_kept(shape, sparsity) == kept_count(outs * ins, sparsity) * rows * columns
    sums = score.view(outs, rows, ins, columns).sum((1, 3)).flatten()
    assert torch.equal(blocks.all(1), top_mask(sums, kept_count(outs * ins, sparsity)))


def test_the_inputs_of_a_convolution_are_flattened_with_the_channel_first() -> None:
    score = torch.arange(2 * 2 * 2 * 2.0).view(2, 2, 2, 2)
    assert NOfM(1, 4).mask(score, 0).view(2, 8).tolist() == [[False, False, False, True] * 2] * 2
    blocks = Block(2, 4).mask(score, 0.5)
    assert blocks[:, 1].all()
    assert not blocks[:, 0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_scores_of_every_type_are_taken(dtype: torch.dtype) -> None:
    score = torch.arange(8).view(2, 4).to(dtype)
    expected = [[False] * 4, [True] * 4]
    assert Unstructured().mask(score, 0.5).tolist() == expected
    assert Block(1, 4).mask(score, 0.5).tolist() == expected
    assert NOfM(2, 4).mask(score, 0.5).tolist() == [[False, False, True, True]] * 2


def test_a_random_score_gives_the_exact_count_for_every_pattern() -> None:
    score = CRITERIA["random"](torch.zeros(8, 8), torch.Generator().manual_seed(0))
    for text in ("unstructured", "2:4", "block:2x2"):
        pattern = parse_pattern(text)
        assert int(pattern.mask(score, 0.75).sum()) == pattern.num_kept((8, 8), 0.75), text


def test_a_mask_follows_indices_not_memory() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    for pattern in (Unstructured(), NOfM(1, 3), Block(1, 3)):
        assert torch.equal(pattern.mask(score.t().contiguous().t(), 0.5), pattern.mask(score, 0.5))


@pytest.mark.parametrize(
    ("numel", "sparsity", "kept"),
    [(10, 0, 10), (10, 0.9, 1), (10, 0.99, 1), (1, 0.9, 1), (3, 0.5, 1), (1000, 0.999, 1), (1000, 0.123, 877)],
)
def test_the_count_is_the_nearest_whole_one_but_never_zero(numel: int, sparsity: float, kept: int) -> None:
    assert kept_count(numel, sparsity) == kept


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_one_element_and_empty_tensors_have_masks(sparsity: float) -> None:
    assert Unstructured().mask(torch.tensor([[0.0]]), sparsity).tolist() == [[True]]
    assert Unstructured().mask(torch.tensor(0.0), sparsity).tolist() is True
    assert Unstructured().mask(torch.zeros(0, 3), sparsity).shape == (0, 3)
    assert Unstructured().num_kept((0, 3), sparsity) == 0
    assert NOfM(2, 4).mask(torch.zeros(0, 4), sparsity).shape == (0, 4)
    assert Block(2, 2).mask(torch.zeros(0, 4), sparsity).shape == (0, 4)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "block:2x2"])
def test_scores_that_are_nan_are_refused(text: str) -> None:
    score = torch.ones(4, 4)
    score[1, 2] = score[3, 3] = float("nan")
    with pytest.raises(UserError, match="2 of 16 scores are NaN"):
        parse_pattern(text).mask(score, 0.5)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("2:4", NOfM(2, 4)),
        ("1:16", NOfM(1, 16)),
        ("block:4x1", Block(4, 1)),
        ("block:16x32", Block(16, 32)),
    ],
)
def test_a_text_names_a_pattern(text: str, pattern: Pattern) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown pattern ''"),
        ("unstructred", "did you mean 'unstructured'?"),
        ("unstructured:2", "takes no options, got '2'"),
        ("4:2", "the pattern '4:2' keeps 4 of 2"),
        ("4:4", "the pattern '4:4' keeps 4 of 4"),
        ("0:4", "N:M needs 0 < N < M"),
        ("2:4:6", "unknown pattern '2'"),
        ("4x3", "known: unstructured, block, N:M such as 2:4"),
        ("-2:4", "unknown pattern '-2'"),
        ("2 : 4", "unknown pattern '2 '"),
        ("1:" + "9" * 5000, "unknown pattern '1'"),
        ("block", "cannot read the block size ''"),
        ("block:4", "cannot read the block size '4'"),
        ("block:0x4", "cannot read the block size '0x4'"),
        ("block:4x1x1", "write it as rows x columns"),
        ("block:" + "9" * 5000 + "x1", "cannot read the block size"),
    ],
)
def test_a_text_that_names_no_pattern_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_pattern(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        ("unstructured", (), None),
        ("unstructured", (3, 5), None),
        ("2:4", (3, 8), None),
        ("2:4", (3, 2, 2, 2), None),
        ("2:4", (4, 6), "6 inputs do not divide into runs of 4"),
        ("2:4", (4,), "1 dimension(s)"),
        ("2:4", (), "0 dimension(s)"),
        ("block:4x2", (8, 3, 2), None),
        ("block:4x2", (6, 4), "6 x 4 does not divide into blocks of 4 x 2"),
        ("block:4x2", (8, 5), "8 x 5 does not divide into blocks of 4 x 2"),
        ("block:4x1", (8,), "1 dimension(s)"),
        ("block:4x1", (), "0 dimension(s)"),
    ],
)
def test_a_shape_that_cannot_have_the_pattern_gets_the_reason(text: str, shape: tuple[int, ...], reason: str) -> None:
    refusal = parse_pattern(text).refusal(shape)
    assert refusal is None if reason is None else reason in (refusal or "")


def test_only_n_of_m_fixes_the_sparsity() -> None:
    assert parse_pattern("1:4").fixed_sparsity == 0.75
    assert parse_pattern("unstructured").fixed_sparsity is None
    assert parse_pattern("block:2x2").fixed_sparsity is None


def test_a_registered_pattern_reads_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PATTERNS, "_entries", {**vars(PATTERNS)["_entries"]})
    PATTERNS.add("rows", lambda options: Block(int(options), 1))
    assert parse_pattern("rows:3") == Block(3, 1)
