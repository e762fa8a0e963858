"""Runs the blocks of a page in order, in the working folder, as a reader would: `python tests/doc_page.py docs/x.md`.

A process of its own for each page: its Python blocks share their names, and what they register stays here.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, "")  # as where somebody types the blocks
sys.path.append(str(Path(__file__).parent.parent))

from tests.doc_blocks import Block, blocks_of, not_printed


def run_page(page: str) -> None:
    """Raises AssertionError, with what was printed, for the first block that does not do what the page says."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks_of(page):
        if "file" in block.notes:
            Path(block.notes["file"]).write_text(block.text + "\n")
        elif "output" in block.notes:
            missing = not_printed(block.text, printed)
            assert not missing, f"{page}:{block.line}: {missing[0]!r} was not printed, but\n{printed}"
        elif block.is_run:
            printed = _bash(block) if block.language == "bash" else _python(block, names)


def _bash(block: Block) -> str:
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False
    )
    wanted = int(block.notes.get("exit", "0"))
    assert ended.returncode == wanted, f"{block.page}:{block.line}: exit code {ended.returncode}\n{ended.stdout}"
    return ended.stdout


def _python(block: Block, names: dict[str, Any]) -> str:
    # Lines of a traceback are those of the page.
    code = compile("\n" * (block.line - block.notes.get("with", "").count("\n") - 1) + block.code, block.page, "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


if __name__ == "__main__":
    run_page(sys.argv[1])
