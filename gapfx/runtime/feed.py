"""Training batches by step: the same global batches in the same order at any number of ranks, from any step on."""

from __future__ import annotations

import dataclasses
import itertools
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset, default_collate

from gapfx.errors import GapfxError, TaskError, UserError
from gapfx.runtime.seeds import generator, seed_everything

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Feed:
    """Micro-batches of `rank` among `world_size` ranks.

    `data` is a map-style dataset (`__len__` and `__getitem__`), which is shuffled anew each epoch, or an iterable of
    samples, which is taken in its own order. The last samples of an epoch that fill no global batch are left out.
    `given_steps_per_epoch` shortens an epoch; an iterable without a length needs it.
    """

    data: Any
    micro_batch: int
    accumulation: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    collate: Collate = default_collate
    given_steps_per_epoch: int = 0

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch * self.accumulation * self.world_size

    def among(self, rank: int, size: int) -> Feed:
        """The same global batches for `size` ranks: each takes more micro-batches a step where that are fewer."""
        accumulation = self.accumulation * self.world_size // size
        return dataclasses.replace(self, accumulation=accumulation, world_size=size, rank=rank)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in one pass. Raises TaskError when the data has no length or too few samples."""
        try:
            num_samples = len(self.data)
        except TypeError:
            if self.given_steps_per_epoch:
                return self.given_steps_per_epoch
            raise TaskError(
                'data("train") has no length, so the length of an epoch is unknown', fix="give --steps-per-epoch"
            ) from None
        if not num_samples:
            raise TaskError('data("train") is empty', fix="return at least one batch of samples")
        if num_samples < self.global_batch:
            raise UserError(
                f"one global batch of {self.global_batch} samples is more than the {num_samples} training samples",
                fix=f"give a --batch-size of at most {num_samples}",
            )
        whole = num_samples // self.global_batch
        if self.given_steps_per_epoch > whole:
            raise UserError(
                f"{self.given_steps_per_epoch} steps an epoch are more than the {whole} global batches of data",
                fix=f"give --steps-per-epoch of at most {whole}, or leave it out",
            )
        return self.given_steps_per_epoch or whole

    def steps(self, start: int, stop: int) -> Iterator[Iterator[Any]]:
        """For each step in [start, stop), an iterator over this rank's micro-batches.

        Every random stream is seeded just before a micro-batch is fetched, and its forward runs under the same stream.
        """
        samples = self._map_batches(start, stop) if is_map_style(self.data) else self._stream_batches(start)
        batches = blaming_data(samples)
        for step in range(start, stop):
            yield self._micro_batches(step, batches)

    def _micro_batches(self, step: int, batches: Iterator[Any]) -> Iterator[Any]:
        for turn in range(self.accumulation):
            seed_everything(self.seed, step, turn * self.world_size + self.rank)
            yield next(batches)

    def _map_batches(self, start: int, stop: int) -> Iterator[Any]:
        # The loader draws a base seed for its workers; a generator of its own keeps the global stream untouched.
        return iter(
            DataLoader(
                self.data,
                batch_sampler=_Places(self, start, stop),
                collate_fn=self.collate,
                generator=generator(self.seed, start),
            )
        )

    def _stream_batches(self, start: int) -> Iterator[Any]:
        chunks_per_step = self.accumulation * self.world_size
        epoch = start // self.steps_per_epoch
        chunks = self._stream_chunks(epoch)
        for index in itertools.count(epoch * self.steps_per_epoch * chunks_per_step):
            step, place = divmod(index, chunks_per_step)
            # Also for chunks of others and skipped ones: a stream that draws random numbers gives all ranks the same.
            seed_everything(self.seed, step, place)
            chunk = next(chunks)
            if step >= start and place % self.world_size == self.rank:
                yield self.collate(chunk)

    def _stream_chunks(self, epoch: int) -> Iterator[list[Any]]:
        """Micro-batches of all ranks, epoch after epoch, whole steps only."""
        size, per_epoch = self.micro_batch, self.steps_per_epoch * self.accumulation * self.world_size
        while True:
            samples = iter(self.data)
            for index in range(per_epoch):
                chunk = list(itertools.islice(samples, size))
                if len(chunk) < size:
                    raise TaskError(
                        f'data("train") ended after {index * size + len(chunk)} samples of epoch {epoch}, '
                        f"{per_epoch * size} are needed",
                        fix="yield the samples anew on each iter(), or give a smaller --steps-per-epoch",
                    )
                yield chunk
            epoch += 1


@dataclass(frozen=True)
class _Places:
    """Indices of the samples of each micro-batch that a rank takes in [start, stop), worked out as they are asked for.

    What is in memory is the order of one epoch, eight bytes a sample, whatever the number of steps is.
    """

    feed: Feed
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[int]]:
        feed, per_epoch = self.feed, self.feed.steps_per_epoch
        order, order_epoch = torch.empty(0, dtype=torch.int64), -1
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            first = position * feed.global_batch
            for turn in range(feed.accumulation):
                at = first + (turn * feed.world_size + feed.rank) * feed.micro_batch
                yield order[at : at + feed.micro_batch].tolist()

    def __len__(self) -> int:
        return (self.stop - self.start) * self.feed.accumulation

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.feed.data), generator=generator(self.feed.seed, epoch, -1))


def is_map_style(data: Any) -> bool:
    """Whether samples are taken by index; torch's IterableDataset inherits a `__getitem__` that only raises."""
    return hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)


def blaming_data(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches; an exception of the dataset or of `collate` becomes a TaskError that names its line."""
    try:
        yield from batches
    except GapfxError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise TaskError(
            f"reading the data failed: {type(error).__name__}: {error}",
            where=f"{frame.filename}:{frame.lineno}, {frame.line}",
            fix="mend the dataset or collate(); --debug shows the whole traceback",
        ) from error


def whole_loader(data: Any, batch_size: int, collate: Collate = default_collate) -> Iterable[Any]:
    """Every sample of `data` once, in order, in batches; the last one may be smaller."""
    if is_map_style(data):
        return DataLoader(data, batch_size=batch_size, collate_fn=collate, generator=generator(0))
    return _StreamLoader(data, batch_size, collate)


@dataclass(frozen=True)
class _StreamLoader:
    data: Iterable[Any]
    batch_size: int
    collate: Collate

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.data)
        while chunk := list(itertools.islice(samples, self.batch_size)):
            yield self.collate(chunk)


@dataclass(frozen=True)
class DeviceLoader:
    """The batches of `loader`, moved for the model: see `to_model`. `before_batch` is called before each."""

    loader: Iterable[Any]
    device: torch.device
    dtype: torch.dtype | None = None
    before_batch: Callable[[], object] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        for batch in blaming_data(self.loader):
            self.before_batch()
            yield to_model(batch, self.device, self.dtype)

    def __len__(self) -> int:
        return len(self.loader)  # pyright: ignore[reportArgumentType]


def to_model(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """The batch on the model's device; floating tensors in the model's dtype when one is given."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if dtype is not None and value.is_floating_point() else None)

    return tree_map(move, batch)
