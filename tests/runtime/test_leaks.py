"""Fifty phases leave nothing behind: no engines, hooks, groups or memory grow with the number of phases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

PHASES = 50
CODE = """
import gc, json, sys
import torch, deepspeed
from pathlib import Path
from gapfx.commands import Source
from gapfx.runtime import loop
from gapfx.runtime.launch import single_process_environment
from gapfx.runtime.memory import resident_bytes
from gapfx.training import Request, run_training

zero, folder, found = int(sys.argv[1]), Path(sys.argv[2]), []
plain = loop.train_steps

def watched(run, engine, state):
    plain(run, engine, state)
    gc.collect()
    engines = [item for item in gc.get_objects() if type(item) is deepspeed.DeepSpeedEngine and vars(item)]
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in engine.module.modules())
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    found.append([len(engines), hooks, groups, resident_bytes()])

loop.train_steps = watched
flags = dict(rounds=25, groups=2, phase_epochs=0.125, finetune_epochs=0.0, eval_epochs=0.0, zero=zero, state="carry")
task, settings = Source("tests/tasks/classify.py", "", flags).load()
single_process_environment()
run_training(task, settings, Request(folder / "run", stream=open(folder / "log", "w")))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_fifty_phases_leave_nothing_behind(zero: int, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CODE, str(zero), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: list[list[int]] = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == PHASES
    at = {phase: found[phase - 1] for phase in (1, 10, 50)}
    print({phase: [*counts[:3], f"{counts[3] / 2**20:.0f} MiB"] for phase, counts in at.items()})
    assert {tuple(counts[:2]) for counts in found} == {tuple(found[0][:2])}
    assert found[0][0] == 1
    assert at[50][2] == at[10][2]
    assert at[50][3] - at[10][3] < 12 * 2**20  # stage 3 leaves 28 when a closed engine's modules keep anything
