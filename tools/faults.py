"""Kills ranks and damages checkpoints at random, resumes each time, and compares the end with an undisturbed run.

    python tools/faults.py
    python tools/faults.py --kills 10 --damages 4 --nproc 1
    python tools/faults.py --kills 20 --damages 0 --zero 3 --method pgap

Every run trains a small model on two ranks in fp32 with a checkpoint every three steps. A kill is SIGKILL to one rank
or to the launcher, at a random moment; every fifth is timed by the victim itself, inside a save or inside the
exchange at a phase boundary. Kills at random are told apart by whether the process had trained a step. After a kill
the run is resumed until it ends. Damages hit the newest checkpoint of a run that was cut: truncated, bit-flipped and
missing files, and a disk that is full at a save. Each trial must end in the bits of the undisturbed run, or be
refused with exit code 2 and a message. One line a kind, with counts; exit code 1 if any failed.
"""

from __future__ import annotations

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
TASK = """
import os, signal
from pathlib import Path
from tests.tasks.classify import *
import gapfx.runtime.checkpoint as checkpoint, gapfx.runtime.loop as loop

POINTS = {{"save": (checkpoint, "write_tensors"), "rename": (checkpoint, "_finish"), "exchange": (loop, "take_state"),
           "merge": (loop, "prune")}}
point, rank, count = os.environ.get("FAULT", "::").split(":")
if point and os.environ.get("RANK") == rank:
    place, name = POINTS[point]
    plain, calls = getattr(place, name), [0]
    def die(*args, **kwargs):
        calls[0] += 1
        if calls[0] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)
    setattr(place, name, die)
if os.environ.get("FULL"):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FULL"]), resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
"""
POINTS = ("save", "rename", "exchange", "merge")


@dataclass(frozen=True)
class Bench:
    """Where trials run, how many ranks they have, and what they must end in."""

    folder: Path
    nproc: int
    draw: random.Random
    seconds: float = 0.0  # of the undisturbed run
    flags: tuple[str, ...] = ()

    def start(self, out: Path, **environment: str) -> subprocess.Popen[str]:
        """A run, or its continuation."""
        flags = ["--out", str(out), "--nproc", str(self.nproc), "--checkpoint-every", "3", "--rounds", "1"]
        flags += ["--state", "carry", "--log-every", "1", *self.flags]
        flags += ["--resume"] if (out / "config.json").exists() else []
        return subprocess.Popen(
            [sys.executable, "-m", "gapfx", "sparsify", str(self.folder / "task.py"), *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self, out: Path, **environment: str) -> tuple[int, str]:
        """Exit code and errors of a run to its end."""
        process = self.start(out, **environment)
        _, err = process.communicate(timeout=300)
        return process.returncode, err

    def is_whole(self, out: Path) -> bool:
        """Whether a run ended in the bits of the undisturbed one."""
        wanted, found = (load_file(run / "model.safetensors") for run in (self.folder / "undisturbed", out))
        return wanted.keys() == found.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def kill(bench: Bench, out: Path, *, by_itself: bool) -> str:
    """Kill a run once, if it does not end before; the kind of kill."""
    if by_itself:
        point = bench.draw.choice(POINTS)
        victim = bench.draw.randrange(bench.nproc if point != "rename" else 1)  # the first rank puts it in place
        code, err = bench.finish(out, FAULT=f"{point}:{victim}:{bench.draw.randint(1, 3)}")
        assert not code or code == -signal.SIGKILL or "was killed by signal 9" in err, err
        return f"killed in {point}" if code else "ended first"
    metrics = out / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else ""
    process = bench.start(out)
    time.sleep(bench.draw.uniform(0.4, 1.0) * bench.seconds)  # before that a process imports its libraries
    try:
        ranks = psutil.Process(process.pid).children()
        victims = [process.pid] if not ranks or bench.draw.random() < 0.3 else [bench.draw.choice(ranks).pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        victims = []
    process.communicate(timeout=120)
    time.sleep(0.3)
    if not victims or not process.returncode:
        return "ended first"
    after = metrics.read_text() if metrics.exists() else ""
    return "killed while training" if _last_step(after) > _last_step(before) else "killed before its first step"


def _last_step(metrics: str) -> int:
    """The last step that was logged whole, 0 if none."""
    found = re.findall(r'"event": "step", "step": ([0-9]+).*}', metrics)
    return int(found[-1]) if found else 0


def cut_run(bench: Bench, out: Path) -> None:
    """A run that was killed after some checkpoints."""
    bench.finish(out, FAULT=f"exchange:0:{bench.draw.randint(4, 6)}")
    assert len(list((out / "checkpoints").glob("step-*"))) > 1


def truncated(path: Path, draw: random.Random) -> None:
    """Cut a file anywhere."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def flipped(path: Path, draw: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def missing(path: Path, draw: random.Random) -> None:
    """Delete the file."""
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (truncated, flipped, missing)


def verdict(bench: Bench, out: Path) -> str:
    """Resume to the end: same bits, refused, or what went wrong."""
    code, err = bench.finish(out)
    if code == 2 and "to do:" in err:
        return "refused with a message"
    if code:
        return f"FAILED with {code}: {err[-300:]}"
    return "same bits" if bench.is_whole(out) else "FAILED: other bits"


def main(
    kills: Annotated[int, typer.Option(help="SIGKILLs, a fifth of them inside a save or an exchange.")] = 60,
    damages: Annotated[int, typer.Option(help="Damages of each kind.")] = 5,
    nproc: Annotated[int, typer.Option(help="Ranks.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of moments and victims.")] = 0,
    zero: Annotated[int, typer.Option(help="ZeRO stage.")] = 1,
    method: Annotated[str, typer.Option(help="Method of the runs.")] = "gap",
) -> None:
    """Print one line a kind of fault."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), nproc, random.Random(seed), flags=("--zero", str(zero), "--method", method))
        (bench.folder / "task.py").write_text(TASK.format())
        began = time.monotonic()
        code, err = bench.finish(bench.folder / "undisturbed")
        assert code == 0, err
        bench = dataclasses.replace(bench, seconds=time.monotonic() - began)
        done, trial = 0, 0
        while done < kills:
            out, kinds, trial = bench.folder / f"kill-{trial}", list[str](), trial + 1
            for _ in range(4):
                kinds.append(kill(bench, out, by_itself=(done + len(kinds)) % 5 == 4))
                if kinds[-1] == "ended first":
                    break
            struck = [kind for kind in kinds if kind != "ended first"]
            done += len(struck)
            end = verdict(bench, out) if "ended first" not in kinds else "same bits" * bench.is_whole(out)
            counts.update(f"{kind}: {end or 'FAILED: other bits'}" for kind in struck)
            shutil.rmtree(out)
            print(f"{done} of {kills} kills", file=sys.stderr, flush=True)
        for damage in DAMAGES:
            for index in range(damages):
                out = bench.folder / f"{damage.__name__}-{index}"
                cut_run(bench, out)
                newest = max((out / "checkpoints").glob("step-*"))
                damage(bench.draw.choice(sorted(newest.iterdir())), bench.draw)
                counts[f"{damage.__name__} file: {verdict(bench, out)}"] += 1
        for index in range(damages):
            out = bench.folder / f"full-{index}"
            cut_run(bench, out)
            code, err = bench.finish(out, FULL=str(bench.draw.choice([0, 1000, 20_000])))
            told = "told" if code == 2 and "to do:" in err else f"FAILED with {code}: {err[-300:]}"
            counts[f"full disk ({told}), then freed: {verdict(bench, out)}"] += 1
    for kind, count in sorted(counts.items()):
        print(f"{count:3} {kind}")
    raise typer.Exit(1 if any("FAILED" in kind for kind in counts) else 0)


if __name__ == "__main__":
    typer.run(main)
