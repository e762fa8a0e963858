"""Batches by step: the same for any number of ranks and from any step on, and errors for data that cannot give them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from gapfx.errors import TaskError, UserError
from gapfx.runtime.feed import DeviceLoader, Feed, is_map_style, to_model, whole_loader
from gapfx.runtime.seeds import generator


class Stream(IterableDataset[Tensor]):
    """0, 1, ... from each iter() on."""

    def __init__(self, num_samples: int, is_noisy: bool = False) -> None:
        self.num_samples, self.is_noisy = num_samples, is_noisy

    def __iter__(self) -> Iterator[Tensor]:
        start = torch.randint(1000, ()) * 1000 if self.is_noisy else 0
        for index in range(self.num_samples):
            yield torch.tensor(index) + start + (torch.rand(()) / 2 if self.is_noisy else 0)


class Noisy(Dataset[Tensor]):
    """Samples with an augmentation of their own."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(()) / 2


class Plain:
    """An iterable that is no torch class."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(26))


DATA = {
    "list": list(range(26)),
    "tensors": TensorDataset(torch.arange(26)),
    "noisy": Noisy(),
    "stream": Stream(26),
    "noisy stream": Stream(26, is_noisy=True),
    "plain": Plain(),
}
Step = list[list[float]]


def feed_of(name: str, micro_batch: int = 2, accumulation: int = 2, **changes: Any) -> Feed:
    """8 samples a step over all ranks, 3 steps an epoch."""
    feed = Feed(DATA[name], micro_batch, accumulation, seed=5, given_steps_per_epoch=3)
    return dataclasses.replace(feed, **changes)


def values(batch: Any) -> list[float]:
    return (batch[0] if isinstance(batch, list) else batch).tolist()


def taken(feed: Feed, start: int, stop: int) -> list[Step]:
    """Each step's micro-batches; what the forward would draw is appended to each micro-batch."""
    return [[[*values(batch), float(torch.rand(()))] for batch in batches] for batches in feed.steps(start, stop)]


def over_ranks(feed: Feed, world_size: int, start: int, stop: int) -> list[Step]:
    """Each step's micro-batches of all ranks, by their place in the global batch."""
    ranks = [taken(dataclasses.replace(feed, world_size=world_size, rank=r), start, stop) for r in range(world_size)]
    return [[micro for turn in zip(*step, strict=True) for micro in turn] for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_micro_batches_and_random_streams(name: str, world_size: int) -> None:
    expected = over_ranks(feed_of(name, accumulation=4), 1, 0, 7)
    assert [len(step) for step in expected] == [4] * 7
    assert over_ranks(feed_of(name, accumulation=4 // world_size), world_size, 0, 7) == expected


@pytest.mark.parametrize("name", ["list", "tensors", "stream", "plain"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_split_of_the_global_batch_holds_the_same_samples(name: str, world_size: int) -> None:
    def samples(steps: list[Step]) -> list[list[float]]:
        return [sorted(itertools.chain.from_iterable(micro[:-1] for micro in step)) for step in steps]

    whole = samples(over_ranks(feed_of(name, micro_batch=8, accumulation=1), 1, 0, 7))
    assert samples(over_ranks(feed_of(name, 8 // world_size, 1), world_size, 0, 7)) == whole


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("start", range(8))
def test_any_start_gives_the_same_continuation(name: str, start: int) -> None:
    for world_size in (1, 2):
        feed = feed_of(name, accumulation=4 // world_size)
        assert over_ranks(feed, world_size, start, 9) == over_ranks(feed, world_size, 0, 9)[start:]


@pytest.mark.parametrize("name", ["list", "stream"])
def test_a_start_far_into_the_run_needs_no_replay_of_past_epochs(name: str) -> None:
    feed = feed_of(name)
    assert len(taken(feed, 3_000_000, 3_000_003)) == 3


def test_an_epoch_is_a_shuffle_without_repeats_and_the_next_one_another() -> None:
    feed = Feed(list(range(26)), micro_batch=4, accumulation=2)
    assert feed.global_batch == 8
    assert feed.steps_per_epoch == 3
    epochs = [[x for step in taken(feed, at, at + 3) for micro in step for x in micro[:-1]] for at in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 24
        assert epoch != sorted(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = dataclasses.replace(feed, seed=1)
    assert taken(other, 0, 3) != taken(feed, 0, 3)


def test_the_order_of_an_epoch_is_drawn_from_the_seed_and_its_number_alone() -> None:
    for rank in (0, 1):
        feed = Feed(list(range(26)), micro_batch=3, accumulation=2, world_size=2, rank=rank, seed=5)
        micros = [micro[:-1] for step in taken(feed, 0, 5) for micro in step]
        expected: list[list[int]] = []
        for epoch in range(3):
            order = torch.randperm(26, generator=generator(5, epoch, -1)).tolist()
            expected += [order[at : at + 3] for at in (3 * rank, 6 + 3 * rank, 12 + 3 * rank, 18 + 3 * rank)]
        assert micros == expected[: len(micros)]
        assert len(micros) == 10


def test_a_phase_begins_at_once_however_many_steps_it_has() -> None:
    feed = Feed(list(range(26)), micro_batch=4, accumulation=2)
    for start in (0, 10**12):
        first = next(feed.steps(start, start + 10**12))
        assert [values(batch) for batch in first] == [micro[:-1] for micro in taken(feed, start, start + 1)[0]]


def test_a_stream_is_taken_in_its_own_order_and_anew_each_epoch() -> None:
    steps = taken(feed_of("stream"), 0, 5)
    assert [[x for micro in step for x in micro[:-1]] for step in steps] == [
        [float(x) for x in range(at, at + 4)] for at in (0, 4, 8, 0, 4)
    ]


def test_the_collate_function_of_the_task_makes_the_batches() -> None:
    for data in (list(range(8)), Plain()):
        feed = Feed(data, 2, 1, collate=lambda samples: ("mine", sorted(samples)), given_steps_per_epoch=2)
        (batches,) = feed.steps(0, 1)
        (batch,) = batches
        assert batch[0] == "mine"
        assert len(batch[1]) == 2


@pytest.mark.parametrize(
    ("feed", "error", "message"),
    [
        (Feed(Stream(9), 2, 1), TaskError, 'data("train") has no length, so the length of an epoch is unknown'),
        (Feed(Plain(), 2, 1), TaskError, "to do: give --steps-per-epoch"),
        (Feed([], 2, 1), TaskError, 'data("train") is empty'),
        (Feed([1, 2, 3], 2, 2), UserError, "one global batch of 4 samples is more than the 3 training samples"),
        (Feed([1, 2, 3], 2, 1, world_size=2), UserError, "give a --batch-size of at most 3"),
        (
            Feed(list(range(9)), 2, 2, given_steps_per_epoch=3),
            UserError,
            "3 steps an epoch are more than the 2 global batches of data\n  to do: give --steps-per-epoch of at most 2",
        ),
    ],
)
def test_data_without_an_epoch_is_refused(feed: Feed, error: type[UserError], message: str) -> None:
    with pytest.raises(error) as caught:
        taken(feed, 0, 1)
    assert message in str(caught.value)


def test_given_steps_shorten_the_epoch() -> None:
    feed = Feed(list(range(26)), 2, 1, given_steps_per_epoch=3)
    assert feed.steps_per_epoch == 3
    assert taken(feed, 0, 3) != taken(feed, 3, 6)


@pytest.mark.parametrize(("num_samples", "ended"), [(9, 9), (0, 0), (11, 11)])
def test_a_stream_that_ends_early_says_how_many_samples_are_needed(num_samples: int, ended: int) -> None:
    feed = Feed(Stream(num_samples), 2, 2, given_steps_per_epoch=3)
    with pytest.raises(TaskError) as caught:
        taken(feed, 0, 3)
    assert f'data("train") ended after {ended} samples of epoch 0, 12 are needed' in str(caught.value)
    assert "yield the samples anew on each iter(), or give a smaller --steps-per-epoch" in str(caught.value)


def test_an_iterator_that_can_be_read_only_once_fails_in_its_second_epoch() -> None:
    feed = Feed(iter(range(4)), 2, 1, given_steps_per_epoch=2)
    with pytest.raises(TaskError, match="ended after 0 samples of epoch 1, 4 are needed"):
        taken(feed, 0, 3)


@pytest.mark.parametrize(("name", "expected"), [("list", True), ("noisy", True), ("stream", False), ("plain", False)])
def test_torch_streams_are_told_from_datasets(name: str, expected: bool) -> None:
    assert is_map_style(DATA[name]) is expected


@pytest.mark.parametrize("name", ["list", "tensors", "stream", "plain"])
def test_the_whole_loader_gives_every_sample_once_in_order(name: str) -> None:
    before = torch.get_rng_state()
    loader = whole_loader(DATA[name], 8)
    for _ in range(2):
        batches = [values(batch) for batch in loader]
        assert [len(batch) for batch in batches] == [8, 8, 8, 2]
        assert list(itertools.chain.from_iterable(batches)) == list(range(26))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_move_with_floats_in_the_models_type_and_the_rest_as_it_is() -> None:
    batch = {"x": torch.ones(2), "y": (torch.ones(2, dtype=torch.int64), "text"), "mask": torch.tensor([True])}
    moved = to_model(batch, torch.device("cpu"), torch.bfloat16)
    assert moved["x"].dtype == torch.bfloat16
    assert moved["y"][0].dtype == torch.int64
    assert moved["y"][1] == "text"
    assert moved["mask"].dtype == torch.bool
    assert to_model(batch, torch.device("cpu"), None)["x"].dtype == torch.float32


def test_a_device_loader_is_as_long_as_its_loader_and_can_be_read_again() -> None:
    loader = DeviceLoader(whole_loader(list(range(5)), 2), torch.device("cpu"))
    assert len(loader) == 3
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    stream = DeviceLoader(whole_loader(Stream(5), 2), torch.device("cpu"))
    assert [batch.tolist() for batch in stream] == [[0, 1], [2, 3], [4]]
