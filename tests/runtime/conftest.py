"""What tests of the runtime share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gapfx.runtime.engine import process_group
from gapfx.runtime.launch import single_process_environment
from tests.runs import no_rank_left_behind


@pytest.fixture(scope="module")
def in_process_group() -> Iterator[None]:
    """This process is the only rank of a group while a file's tests run, and no rank afterwards."""
    with no_rank_left_behind():
        if not torch.distributed.is_initialized():
            single_process_environment()
        with process_group():
            yield
