"""Runs one case in a child process with limits, so that no case can harm another one or the sweep."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tools.zoo_cases.cases import Case
from tools.zoo_cases.checks import Result, check, peak_mib

# torch imports it late, in models and in seeding; here it costs its second once and not in each child.
importlib.import_module("torch._dynamo")
MEMORY_BYTES = 12 * 2**30


def run_isolated(case: Case, seconds: float = 0, checks: Callable[[Case], Result] = check) -> dict[str, Any]:
    """The result of a case as plain data; a child that is killed or runs out of time is a failed case.

    The child is forked: it has the libraries that this process imported. 0 seconds stand for the case's own limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(case, checks, answer)
        cause = _wait(pid, seconds or case.seconds)
        if answer.exists():
            found = json.loads(answer.read_text())
        else:
            failed = Result(case.key, case.family, "failed", {"process": cause or "it ended without an answer"})
            found = asdict(failed)
    found["facts"]["seconds"] = round(time.monotonic() - began, 2)
    return found


def _child(case: Case, checks: Callable[[Case], Result], answer: Path) -> None:
    """Check the case, write the answer, and end without the parent's clean-up."""
    try:
        # A group of its own: what the case starts ends with it.
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        warnings.simplefilter("ignore")
        # It asks the machine for entropy: a model that draws its own seeds would never repeat itself.
        torch.__dict__["seed"] = draw_seed
        before = peak_mib()
        result = checks(case)
        result.facts["peak_mib"] = peak_mib() - before
        answer.with_suffix(".part").write_text(json.dumps(asdict(result)))
        answer.with_suffix(".part").rename(answer)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
    finally:
        os._exit(0)


def draw_seed() -> int:
    """A number from the generator, which gets it as its seed: `torch.seed` for a run that can be repeated."""
    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    return seed


def _wait(pid: int, seconds: float) -> str:
    """Wait for the child; why it was killed, if it was."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"stopped after {seconds:g} seconds"
