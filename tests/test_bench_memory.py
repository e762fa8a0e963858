"""The bench of memory runs, and tells what it promises of every rank."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.runs import ROOT


@pytest.mark.distributed
def test_the_bench_prints_peaks_and_optimizer_bytes_of_each_rank() -> None:
    sizes = ("--blocks", "4", "--width", "64", "--length", "16", "--steps", "4", "--dtype", "fp32")
    done = subprocess.run(
        [sys.executable, "tools/bench_memory.py", *sizes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:16].strip() for line in lines] == ["plain DeepSpeed", "plain, fused", "gapfx masked", "gapfx compact"]
    for line in lines:
        assert re.search(r"\(ranks [1-9]\d*/[1-9]\d*\)", line), line
    shares = [float(share) for line in lines for share in re.findall(r"optimizer \S+ MiB \((\S+)\)", line)]
    assert len(shares) == 4
    assert shares[:2] == [1.0, 1.0]
    assert shares[3] < 0.6 < shares[2], "live values alone against whole weights"
