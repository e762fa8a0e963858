"""How ranks find each other: a process alone in its own memory, ranks that torchrun has started again by a fresh name.

A process alone needs no port, and so none that another program could have taken since it was found free.

torchrun keeps one store over all restarts of its ranks. The addresses that the lost ranks wrote there are still in it,
and a new rank that asks before its peer has written anew tries to reach a process that is no more. So the ranks of each
start agree on a name first, and write below it.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch

from gapfx.runtime.ranks import Peers

_DISTRIBUTED: Any = torch.distributed
_SCHEME = "gapfx"
_POLL_SECONDS = 0.02


class Store(Protocol):
    """What is used of torch's stores: keys that all ranks see; `get` waits for a key."""

    @property
    def timeout(self) -> timedelta:
        """For how long `get` waits."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        ...

    def get(self, key: str) -> bytes:
        """The value, once it is there."""
        ...

    def set(self, key: str, value: str) -> object:
        """Write a value."""
        ...


def init_method() -> str | None:
    """How torch shall join the process group; None for its own way, by the environment."""
    if not _is_alone() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    _register()
    return f"{_SCHEME}://"


def is_restarted() -> bool:
    """Whether torchrun started any rank of the group again after one was lost (collective).

    A machine that came in its place counts no restarts of its own.
    """
    return any(Peers.all().tell(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0))


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE") == "1"


@cache
def _register() -> None:
    _DISTRIBUTED.register_rendezvous_handler(_SCHEME, _rendezvous)


def _rendezvous(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    if _is_alone():
        yield _DISTRIBUTED.HashStore(), 0, 1
        raise RuntimeError("a process group is joined once")
    store, rank, size = next(iter(_DISTRIBUTED.rendezvous("env://", **options)))
    yield fresh_store(store, rank, size), rank, size
    raise RuntimeError("a process group is joined once")


def fresh_store(store: Store, rank: int, size: int) -> Store:
    """The part of a store that the ranks which call this together have for themselves (collective).

    A rank that comes later than its peers waits for them, and no key of an earlier start is seen.
    """
    name = _give_name(store, size) if rank == 0 else _take_name(store, rank)
    return _DISTRIBUTED.PrefixStore(name, store)


def _give_name(store: Store, size: int) -> str:
    """Rank 0 answers each greeting, also one that a lost rank left behind, until all ranks have taken the name."""
    name, missing = uuid.uuid4().hex, set(range(1, size))
    deadline = time.monotonic() + store.timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                store.set(f"name/{store.get(f'hello/{rank}').decode()}", name)
        missing -= {rank for rank in missing if store.check([f"taken/{name}/{rank}"])}
        if time.monotonic() > deadline:
            raise RuntimeError(f"Timed out waiting for ranks {sorted(missing)} to join")
        time.sleep(_POLL_SECONDS)
    return name


def _take_name(store: Store, rank: int) -> str:
    greeting = uuid.uuid4().hex
    store.set(f"hello/{rank}", greeting)
    name = store.get(f"name/{greeting}").decode()
    store.set(f"taken/{name}/{rank}", "")
    return name
