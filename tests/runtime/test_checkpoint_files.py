"""The files of a checkpoint: plain safetensors, written from where the state is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from gapfx.runtime.checkpoint import save_checkpoint
from tests.runtime.test_checkpoint import raw, state_of


def test_the_file_is_one_that_safetensors_reads_with_every_tensor_of_the_state(tmp_path: Path) -> None:
    state = state_of(12)
    state.buffers |= {"u16": torch.arange(3).to(torch.uint16), "u64": torch.arange(3).to(torch.uint64)}
    found = load_file(save_checkpoint(tmp_path, state, keep=1) / "rank-00000.safetensors")
    tables: dict[str, dict[str, Tensor]] = {"weights": state.weights, "bits": state.bits, "explored": state.explored}
    tables |= {"sparse_bits": state.sparse_bits, "buffers": state.buffers}
    tables |= {f"moment:{key}": moments for key, moments in state.optimizer.moments.items()}
    expected = {f"{table}/{fqn}": raw(value) for table, values in tables.items() for fqn, value in values.items()}
    assert {key: raw(value) for key, value in found.items()} == expected


PEAK = """
import resource, sys
from pathlib import Path
import torch
from gapfx.runtime.checkpoint import save_checkpoint
from gapfx.runtime.state import OptimizerState, Spread, TrainState

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

numel = 4 << 20
layout = {f"w{index}": Spread((numel,)) for index in range(8)}
weights = {fqn: torch.full((numel,), float(index)) for index, fqn in enumerate(layout)}
state = TrainState(layout, weights, optimizer=OptimizerState({"exp_avg": {fqn: w + 1 for fqn, w in weights.items()}}))
before = peak()
save_checkpoint(Path(sys.argv[1]), state, keep=1)
print(peak() - before)
"""


def test_writing_takes_no_second_copy_of_the_state(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 32, "MiB, of a state of 256"
