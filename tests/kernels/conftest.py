"""Kernels at every level of instructions that this processor has."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from gapfx.kernels import native


@pytest.fixture(params=range(len(native.LEVELS)), ids=native.LEVELS)
def level(request: pytest.FixtureRequest) -> Generator[str]:
    """All kernels use this level meanwhile; its name."""
    library = native.needed()
    before = library.gapfx_level()
    if library.gapfx_use_level(request.param) != request.param:
        library.gapfx_use_level(before)
        pytest.skip("this processor lacks the instructions")
    yield native.LEVELS[request.param]
    library.gapfx_use_level(before)
