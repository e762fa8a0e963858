"""Starts the local ranks of a run, watches over them, and turns their ends into one exit code.

Three ways to run, decided by `RANK` and the number of processes: a launcher such as torchrun has set `RANK`, so this
process joins; one process needs no launcher; several are started here. Standard library only, so that starting ranks
costs no import of torch in the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from gapfx.errors import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_VARIABLE = "GAPFX_LAUNCHER_PID"
INTERRUPTED_CODE = 130

_LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0


def is_rank() -> bool:
    """Whether a launcher has made this process a rank.

    Raises UserError when `RANK` is set without the other variables that a rank needs.
    """
    if "RANK" not in os.environ:
        return False
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, but {', '.join(missing)} is not",
            where="the environment",
            fix="start with torchrun or the deepspeed launcher, or unset RANK and use --nproc",
        )
    return True


def single_process_environment() -> None:
    """Make this process rank 0 of 1 on a free port."""
    with _reserved_port() as port:
        os.environ.update(_rank_variables(rank=0, nproc=1, port=port))


def run_local_ranks(argv: Sequence[str], nproc: int) -> int:
    """Run `gapfx ARGV` as `nproc` ranks on this machine and return the exit code of the run, as `run_ranks` does."""
    # The whole path, as the folder of the task file may stand before it.
    has_working_folder = any(entry in ("", os.getcwd()) for entry in sys.path)
    # `-m` would put the working folder first on the path, where the console script does not have it.
    safe_path = [] if has_working_folder else ["-P"]
    return run_ranks([sys.executable, *safe_path, "-m", "gapfx", *argv], nproc)


def run_ranks(command: Sequence[str], nproc: int, *, grace_seconds: float = _GRACE_SECONDS) -> int:
    """Run `command` as `nproc` ranks on this machine and return the exit code of the run.

    0 when every rank ended with 0, else the code of the first that failed; 1 for a rank killed by a signal; 130 for
    ranks that stopped because this process got SIGINT or SIGTERM, which is passed on once (a second one kills). When a
    rank fails the others get SIGTERM, and SIGKILL after `grace_seconds`; when the first interrupted rank has ended the
    others have as long. The output of rank 0 is shown as it is, the standard error of the others with their rank in
    front.
    """
    if nproc < 1:
        raise UserError(f"cannot start {nproc} processes", fix="give --nproc a number of at least 1")
    with _caught_signals() as caught, _reserved_port() as port:
        ranks = _Ranks()
        try:
            for rank in range(nproc):
                ranks.start(command, rank, _rank_environment(rank, nproc, port))
            return _supervise(ranks, caught, grace_seconds)
        finally:
            ranks.send(signal.SIGKILL)


def die_with_launcher() -> None:
    """Make the end of the process that started this rank, however it ends, the end of this rank.

    Does nothing in a process that `run_ranks` did not start.
    """
    launcher = int(os.environ.pop(LAUNCHER_VARIABLE, "0"))
    if not launcher:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(launcher,), daemon=True).start()
    if os.getppid() != launcher:  # it ended before the lines above
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class _Rank:
    """A running child, and the thread that shows its standard error (none for rank 0)."""

    process: subprocess.Popen[str]
    pump: threading.Thread | None


@dataclass
class _Ranks:
    """The children that still run, and a queue of (rank, return code) in the order in which they ended."""

    alive: dict[int, _Rank] = field(default_factory=dict[int, _Rank])
    ended: queue.SimpleQueue[tuple[int, int]] = field(default_factory=queue.SimpleQueue[tuple[int, int]])

    def start(self, command: Sequence[str], rank: int, environment: Mapping[str, str]) -> None:
        """Start one rank in a session of its own, where the terminal's Ctrl-C does not reach it directly."""
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        pump = _start_thread(_show, process.stderr, rank) if process.stderr else None
        self.alive[rank] = _Rank(process, pump)
        _start_thread(lambda: self.ended.put((rank, process.wait())))

    def send(self, number: int) -> None:
        """Send a signal to every running rank and to the processes that it started."""
        for rank in self.alive.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, number)

    def next_end(self) -> tuple[int, int] | None:
        """The next (rank, return code), or None when no rank ended within a moment."""
        try:
            rank, status = self.ended.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            return None
        pump = self.alive.pop(rank).pump
        if pump:
            pump.join(timeout=1)  # its last words come before ours; a stray grandchild may hold the pipe open
        return rank, status


def _supervise(ranks: _Ranks, caught: Sequence[int], grace_seconds: float) -> int:
    code, cause, num_passed_on, deadline, is_stopping = 0, "", 0, math.inf, False
    while ranks.alive:
        if len(caught) > num_passed_on:
            ranks.send(signal.SIGKILL if num_passed_on else caught[0])
            num_passed_on += 1
        if time.monotonic() > deadline:
            ranks.send(signal.SIGKILL)
            is_stopping, deadline = True, math.inf  # how these end says nothing about the run
        end = ranks.next_end()
        if end is None or is_stopping:
            continue
        rank, status = end
        if status == 0:
            continue
        code = _exit_code(status, num_passed_on)
        cause = _cause(rank, status) if status < 0 else ""
        deadline = min(deadline, time.monotonic() + grace_seconds)
        # An interrupted rank has left in good order: the others know that they are to end, and may still be writing.
        if not (num_passed_on and code == INTERRUPTED_CODE):
            is_stopping = True
            ranks.send(signal.SIGTERM)
    if code != INTERRUPTED_CODE:
        _say(cause)  # below the tracebacks of ranks that lost it as their peer
    return code


def _exit_code(status: int, num_passed_on: int) -> int:
    """Exit code for the return code of a child: negative means killed by that signal."""
    if status >= 0:
        return status
    is_asked_for = num_passed_on > 1 or (num_passed_on == 1 and -status in (signal.SIGINT, signal.SIGTERM))
    return INTERRUPTED_CODE if is_asked_for else 1


def _cause(rank: int, status: int) -> str:
    try:
        name = signal.Signals(-status).name
    except ValueError:  # real-time signals have no name
        name = "unnamed"
    hint = "; the usual cause is too little memory" if -status == signal.SIGKILL else ""
    return f"gapfx: rank {rank} was killed by signal {-status} ({name}){hint}\n"


def _rank_environment(rank: int, nproc: int, port: int) -> dict[str, str]:
    num_threads = str(max(1, _num_cores() // nproc))
    variables = _rank_variables(rank=rank, nproc=nproc, port=port)
    return {"OMP_NUM_THREADS": num_threads, **os.environ, **variables, LAUNCHER_VARIABLE: str(os.getpid())}


def _rank_variables(*, rank: int, nproc: int, port: int) -> dict[str, str]:
    return dict(zip(RANK_VARIABLES, (str(rank), str(rank), str(nproc), _LOOPBACK, str(port)), strict=True))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextlib.contextmanager
def _reserved_port() -> Generator[int]:
    """A free port that stays ours until rank 0 listens on it: bound and reusable, but not listening."""
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((_LOOPBACK, 0))
        yield reservation.getsockname()[1]


@contextlib.contextmanager
def _caught_signals() -> Generator[list[int]]:
    """The SIGINT and SIGTERM that this process gets inside the block, in order, in place of their usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may set handlers
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in previous:
            signal.signal(number, lambda number, _frame: caught.append(number))
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start_thread(target: object, *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)  # pyright: ignore[reportArgumentType]
    thread.start()
    return thread


def _show(stream: IO[str], rank: int) -> None:
    with stream:
        for line in stream:
            _say(f"[rank {rank}] {line}")


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _watch_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
