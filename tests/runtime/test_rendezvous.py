"""Ranks of one start find each other in a store that holds what earlier ranks left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from gapfx.runtime.rendezvous import Store, fresh_store, init_method

SIZE = 3
TCP_STORE: Any = torch.distributed.TCPStore  # pyright: ignore[reportPrivateImportUsage]

ALONE = """
import torch
from gapfx.runtime.engine import process_group
with process_group():
    total = torch.ones(2)
    torch.distributed.all_reduce(total)
    torch.distributed.new_group([0])
    assert torch.distributed.get_world_size() == 1 and total.tolist() == [1, 1]
"""


def a_store() -> Any:
    return TCP_STORE("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def clients(server: Any) -> list[Any]:
    return [TCP_STORE("127.0.0.1", server.port, timeout=timedelta(seconds=20)) for _ in range(SIZE)]


def joined(server: Any, last: int) -> list[Store]:
    """The store of each rank; rank `last` comes later than the others."""

    def join(rank: int, store: Any) -> Store:
        time.sleep(0.2 if rank == last else 0)
        return fresh_store(store, rank, SIZE)

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(join, range(SIZE), clients(server)))


@pytest.mark.parametrize("last", range(SIZE))
def test_a_later_start_sees_nothing_of_an_earlier_one(last: int) -> None:
    server = a_store()
    for start in range(3):
        stores = joined(server, last)
        assert not any(store.check(["address"]) for store in stores)
        stores[1].set("address", str(start))
        assert [store.get("address") for store in stores] == [str(start).encode()] * SIZE


def test_a_greeting_of_a_lost_rank_holds_nobody_up() -> None:
    server = a_store()
    server.set("hello/1", "lost")
    stores = joined(server, last=1)
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_without_torchrun_torch_joins_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert init_method() is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert [init_method(), init_method()] == ["gapfx://"] * 2


def test_a_process_alone_needs_no_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        port = {"MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run([sys.executable, "-c", ALONE], env={**os.environ, **alone, **port}, check=False)
    assert done.returncode == 0
