"""What one rank does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def on_rank_0(action: Callable[[], object]) -> None:
    """Run `action` on rank 0; its error is raised on every rank, so that none waits for ever (collective)."""
    failure: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure[0] = error
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
