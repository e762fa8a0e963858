import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Generator
from pathlib import Path
from unittest import mock

import pytest

from gapfx.errors import UserError
from gapfx.runtime import launch

PARENT = """
import sys
from gapfx.runtime.launch import run_ranks
sys.exit(run_ranks([sys.executable, "-c", sys.argv[1]], 2, grace_seconds=float(sys.argv[2])))
"""


@pytest.fixture(autouse=True)
def plain_environment() -> Generator[None]:
    with mock.patch.dict(os.environ):
        for name in (*launch.RANK_VARIABLES, launch.LAUNCHER_VARIABLE):
            os.environ.pop(name, None)
        yield


def run_script(script: str, nproc: int = 2, grace_seconds: float = 0.3) -> int:
    preamble = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    command = [sys.executable, "-c", preamble + textwrap.dedent(script)]
    return launch.run_ranks(command, nproc, grace_seconds=grace_seconds)


def start_parent(script: str, folder: Path, grace_seconds: float = 20) -> subprocess.Popen[bytes]:
    """Start a process that runs `script` as two ranks, and wait until both have written `ready<rank>` in `folder`."""
    preamble = f"""
        import os, signal, sys, time
        from pathlib import Path
        rank, folder = os.environ["RANK"], Path({str(folder)!r})
        """
    text = textwrap.dedent(preamble) + textwrap.dedent(script)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, text, str(grace_seconds)], start_new_session=True)
    wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
    return parent


def wait_until(is_done: Callable[[], bool], seconds: float = 30) -> None:
    stop = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_every_rank_gets_its_variables_and_one_port_that_all_share(tmp_path: Path) -> None:
    names = [*launch.RANK_VARIABLES, "OMP_NUM_THREADS"]
    os.environ.pop("OMP_NUM_THREADS", None)
    script = f"open(r'{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))"
    assert run_script(script, nproc=3) == 0
    seen = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    cores = len(os.sched_getaffinity(0))
    port = seen[0][4]
    assert seen == [[str(rank), str(rank), "3", "127.0.0.1", port, str(max(1, cores // 3))] for rank in range(3)]
    assert 1024 <= int(port) < 65536


def test_a_number_of_threads_that_the_user_set_stays() -> None:
    os.environ["OMP_NUM_THREADS"] = "7"
    assert run_script("sys.exit(os.environ['OMP_NUM_THREADS'] != '7')") == 0


def test_rank_0_speaks_plainly_and_the_others_only_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script("print('out', rank); print('err', rank, file=sys.stderr)") == 0
    shown = capfd.readouterr()
    assert shown.out == "out 0\n"
    assert sorted(shown.err.splitlines()) == ["[rank 1] err 1", "err 0"]


def test_ranks_have_no_standard_input() -> None:
    assert run_script("sys.exit(sys.stdin.read() != '')") == 0


def test_the_code_of_the_first_rank_that_failed_is_the_code_of_the_run() -> None:
    start = time.monotonic()
    assert run_script("sys.exit(2) if rank == 1 else time.sleep(60)") == 2
    assert time.monotonic() - start < 20


def test_a_rank_that_ends_well_leaves_the_others_alone(tmp_path: Path) -> None:
    script = f"rank == 0 or (time.sleep(0.5), open(r'{tmp_path}/done', 'w'))"
    assert run_script(script, grace_seconds=0) == 0
    assert (tmp_path / "done").exists()


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    script = f"""
        ready = r'{tmp_path}/ready'
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: open(r'{tmp_path}/asked', 'w'))
            open(ready, 'w')
            while True: time.sleep(0.1)
        while not os.path.exists(ready): time.sleep(0.01)
        sys.exit(7)
    """
    start = time.monotonic()
    assert run_script(script) == 7
    assert (tmp_path / "asked").exists()
    assert 0.3 <= time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SIGKILL", "gapfx: rank 1 was killed by signal 9 (SIGKILL); the usual cause is too little memory\n"),
        ("SIGTERM", "gapfx: rank 1 was killed by signal 15 (SIGTERM)\n"),
        ("SIGRTMIN", f"gapfx: rank 1 was killed by signal {int(signal.SIGRTMIN)} (SIGRTMIN)\n"),
    ],
)
def test_a_rank_killed_by_a_signal_is_named(name: str, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script(f"os.kill(os.getpid(), signal.{name}) if rank == 1 else time.sleep(60)") == 1
    assert capfd.readouterr().err == message


def test_the_cause_stands_below_what_the_other_ranks_say_about_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"""
        ready = r'{tmp_path}/ready'
        if rank == 0:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit("lost a peer"))
            open(ready, 'w')
            while True: time.sleep(0.05)
        while not os.path.exists(ready): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGSEGV)
    """
    assert run_script(script, grace_seconds=20) == 1
    assert capfd.readouterr().err.splitlines() == [
        "lost a peer",
        "gapfx: rank 1 was killed by signal 11 (SIGSEGV)",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_every_rank_exactly_once(number: signal.Signals, tmp_path: Path) -> None:
    script = """
        def count(number, frame):
            with open(folder / f"signals{rank}", "a") as file: file.write(f"{number} ")
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, count)
        (folder / f"ready{rank}").touch()
        while not (folder / f"signals{rank}").exists(): time.sleep(0.01)
        time.sleep(1.0)
        sys.exit(130)
    """
    parent = start_parent(script, tmp_path)
    os.killpg(parent.pid, number)  # as a terminal does: to the whole foreground process group
    assert parent.wait(30) == 130
    assert [(tmp_path / f"signals{rank}").read_text() for rank in range(2)] == [f"{int(number)} "] * 2


def test_an_interrupted_rank_that_leaves_early_does_not_cut_short_the_checkpoint_of_another(tmp_path: Path) -> None:
    script = """
        def leave(number, frame):
            if rank == "0":
                time.sleep(1.5)
                (folder / "checkpoint").touch()
            sys.exit(130)
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, leave)
        (folder / f"ready{rank}").touch()
        while True: time.sleep(0.05)
    """
    parent = start_parent(script, tmp_path)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) == 130
    assert (tmp_path / "checkpoint").exists()


def test_a_rank_that_hangs_after_another_was_interrupted_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    script = """
        def leave(number, frame):
            if rank == "1": sys.exit(130)
            (folder / "asked").touch()
        signal.signal(signal.SIGTERM, leave)
        (folder / f"ready{rank}").touch()
        while True: time.sleep(0.05)
    """
    parent = start_parent(script, tmp_path, grace_seconds=0.3)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 130
    assert (tmp_path / "asked").exists()


def test_a_rank_that_fails_while_it_is_interrupted_decides_the_exit_code(tmp_path: Path) -> None:
    script = """
        def leave(number, frame):
            if rank == "0": time.sleep(0.5)
            sys.exit(130 if rank == "1" else 1)
        signal.signal(signal.SIGINT, leave)
        (folder / f"ready{rank}").touch()
        while True: time.sleep(0.05)
    """
    parent = start_parent(script, tmp_path)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) == 1


def test_a_rank_that_dies_of_the_interrupt_itself_was_interrupted(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (folder / f"ready{rank}").touch()
        time.sleep(60)
    """
    parent = start_parent(script, tmp_path)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 130


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    script = """
        signal.signal(signal.SIGINT, lambda *_: (folder / f"deaf{rank}").touch())
        (folder / f"ready{rank}").touch()
        while True: time.sleep(0.05)
    """
    parent = start_parent(script, tmp_path)
    parent.send_signal(signal.SIGINT)
    wait_until(lambda: all((tmp_path / f"deaf{rank}").exists() for rank in range(2)))
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) == 130


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("platform", ["linux", "another"])
def test_ranks_die_with_a_killed_launcher(platform: str, tmp_path: Path) -> None:
    script = f"""
        sys.platform = {platform!r}
        from gapfx.runtime.launch import LAUNCHER_VARIABLE, die_with_launcher
        die_with_launcher()
        assert LAUNCHER_VARIABLE not in os.environ
        (folder / f"pid{{rank}}").write_text(str(os.getpid()))
        (folder / f"ready{{rank}}").touch()
        time.sleep(60)
    """
    parent = start_parent(script, tmp_path)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    assert all(is_running(pid) for pid in pids)
    parent.kill()
    parent.wait(30)
    wait_until(lambda: not any(is_running(pid) for pid in pids))


def test_a_rank_whose_launcher_is_gone_before_it_starts_dies_at_once() -> None:
    script = "from gapfx.runtime.launch import die_with_launcher; die_with_launcher(); print('alive')"
    environment = {**os.environ, launch.LAUNCHER_VARIABLE: "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, b"")


def test_a_process_without_a_launcher_stays() -> None:
    launch.die_with_launcher()


def test_the_handlers_of_the_caller_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run_script("pass") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_no_rank_stays_behind_when_a_later_one_cannot_start(tmp_path: Path) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def second_fails(*args: object, **options: object) -> subprocess.Popen[str]:
        if started:
            raise OSError("no more processes")
        started.append(real(*args, **options))  # pyright: ignore[reportArgumentType, reportCallIssue]
        return started[0]

    with mock.patch.object(subprocess, "Popen", second_fails), pytest.raises(OSError, match="no more processes"):
        run_script("time.sleep(60)")
    assert started[0].wait(10) == -signal.SIGKILL


@pytest.mark.parametrize("nproc", [0, -1])
def test_a_run_needs_a_process(nproc: int) -> None:
    with pytest.raises(UserError, match=f"cannot start {nproc} processes"):
        run_script("pass", nproc=nproc)


def test_one_process_becomes_rank_0_of_1_on_a_free_port() -> None:
    assert not launch.is_rank()
    launch.single_process_environment()
    assert launch.is_rank()
    values = [os.environ[name] for name in launch.RANK_VARIABLES]
    assert values[:4] == ["0", "0", "1", "127.0.0.1"]
    assert int(values[4]) > 0


def test_a_half_set_rank_is_the_mistake_of_the_user() -> None:
    os.environ["RANK"] = "0"
    with pytest.raises(UserError, match="LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        launch.is_rank()


@pytest.mark.distributed
def test_ranks_meet_on_the_reserved_port() -> None:
    script = """
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        dist.destroy_process_group()
        sys.exit(int(total.item()) != 3)
    """
    assert run_script(script) == 0
