"""Why native kernels may be missing where tests run; where there is a compiler, their absence is a failure."""

from __future__ import annotations

import shutil
import sysconfig

import pytest

from gapfx.kernels import native


def excuse() -> str:
    """The reason when they are switched off or could not be built here; "" when they must be there."""
    missing, compiler = native.missing_reason(), sysconfig.get_config_var("CC").split()[0]
    return missing if missing.startswith("switched off") or shutil.which(compiler) is None else ""


# With a compiler no test is skipped, unless kernels are switched off: a build that failed fails the tests.
needs_kernels = pytest.mark.skipif(bool(excuse()), reason=excuse() or "they must be there")
