"""The command with which ranks on this machine are started."""

from __future__ import annotations

import os
import sys
from unittest import mock

import pytest

from gapfx.runtime import launch


def test_local_ranks_run_the_command_line() -> None:
    with mock.patch.object(launch, "run_ranks", return_value=5) as run_ranks:
        assert launch.run_local_ranks(["sparsify", "task.py"], 2) == 5
    (command, nproc), _ = run_ranks.call_args
    assert command[0] == sys.executable
    assert command[-4:] == ["-m", "gapfx", "sparsify", "task.py"]
    assert nproc == 2


@pytest.mark.parametrize(
    ("path", "is_safe"),
    [
        (["", "/lib"], False),
        (["HERE", "/lib"], False),
        (["/folder/of/the/task", "HERE", "/lib"], False),
        (["/folder/of/the/task", "/bin", "/lib"], True),
    ],
)
def test_local_ranks_import_from_the_working_folder_exactly_where_this_process_does(
    path: list[str], is_safe: bool
) -> None:
    here = [os.getcwd() if entry == "HERE" else entry for entry in path]
    with mock.patch.object(launch, "run_ranks", return_value=0) as run_ranks, mock.patch.object(sys, "path", here):
        launch.run_local_ranks(["sparsify"], 2)
    (command, _), _ = run_ranks.call_args
    assert ("-P" in command) == is_safe
