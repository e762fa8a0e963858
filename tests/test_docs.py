"""The pages: every command and Python block runs, every flag and link is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from gapfx.cli import app
from tests.doc_blocks import PAGES, ROOT, RUNNABLE, Block, blocks_of, not_printed, parse
from tools.make_api import page as api_page

SLOW_PAGES = (
    "README.md",
    "docs/choosing.md",
    "docs/operating.md",
    "docs/python.md",
    "docs/settings.md",
    "docs/tutorial.md",
)
PROSE = (*PAGES, "CHANGELOG.md", "examples/data/README.md")
BLOCKS = {page: blocks_of(page) for page in PAGES}
# Of torchrun, of the deepspeed launcher, and of tools/bench_step.py.
OTHER_FLAGS = {
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--standalone"),
    *("--hostfile", "--num_gpus", "--num_nodes", "--no_ssh", "--node_rank", "--module"),
    *("--batch", "--model"),
}


def run_page(page: str, folder: Path) -> None:
    """Run the blocks of a page in a folder that has the examples of a checkout."""
    for name in ("examples", "tools", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, str(ROOT / "tests" / "doc_page.py"), page]
    ended = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("page", sorted({p for p in PAGES if any(b.is_run for b in BLOCKS[p])} - set(SLOW_PAGES)))
def test_a_quick_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)  # about a minute of work each, which a machine that others use spreads over many
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_a_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    run_page(page, tmp_path)


def test_every_block_is_run_or_written_or_has_a_reason(golden: Callable[[str, str], None]) -> None:
    left_out = [block for blocks in BLOCKS.values() for block in blocks if block.language in RUNNABLE and block.reason]
    golden("docs_not_run", "\n".join(f"{b.page}: {b.text.splitlines()[0]}  # {b.reason}" for b in left_out))
    unknown = {(block.page, block.line) for blocks in BLOCKS.values() for block in blocks if not _is_known(block)}
    assert unknown == set(), "a block is bash, python, a file, an output, or a text without a language"


def _is_known(block: Block) -> bool:
    is_signature = block.language == "py" and block.page == "docs/api.md"
    return block.language in (*RUNNABLE, "") or is_signature or "file" in block.notes


@pytest.mark.parametrize("page", PROSE)
def test_every_flag_in_a_page_exists(page: str) -> None:
    commands = vars(typer.main.get_command(app))["commands"].values()
    options = [option for command in commands for option in command.params]
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", _own_words((ROOT / page).read_text())))
    assert named - known - OTHER_FLAGS == set()


def _own_words(text: str) -> str:
    """Without comments, tables' rules and commands that are not gapfx's."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return re.sub(
        r"^.*\b(pip install|pytest|python tools/|ruff|pre-commit|git)\b.*$|`(pytest|python|pip|pyright) [^`]*`",
        "",
        text,
        flags=re.M,
    )


@pytest.mark.parametrize("page", [*PROSE, "GROUPS.md", "RESULTS.md", "COVERAGE.md"])
def test_every_link_inside_the_repository_leads_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [link for link in links if "://" not in link and not _leads_somewhere(page, link)]
    assert broken == []


def _leads_somewhere(page: str, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    if not anchor or not target.is_file():
        return target.exists()
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", target.read_text(), flags=re.M | re.S), flags=re.M)
    return anchor in [re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads]


def test_the_reference_is_what_the_docstrings_give() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == api_page()


PAGE = """<!-- with: x = 1 -->
<!-- smoke: --quick -->
```bash
first
second
```

<!-- output -->
```
done in 12 s
```

<!-- exit: 2 -->
text between

```python
y = 2
```
"""


def test_a_comment_belongs_to_the_block_right_after_it() -> None:
    first, second, third = parse(PAGE, "page.md")
    assert (first.line, first.language, first.code) == (3, "bash", "x = 1\nfirst\nsecond --quick")
    assert second.notes == {"output": ""}
    assert (third.notes, third.is_run, second.is_run) == ({}, True, False)


def test_an_unknown_comment_before_a_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"page\.md:2: 'not-run' is none of"):
        list(parse("<!-- not-run: slow -->\n```bash\nls\n```\n", "page.md"))


@pytest.mark.parametrize(
    ("shown", "missing"),
    [
        ("step 1 of 20\nloss 3.1e-04", []),
        ("step ...\n...\nloss ...", []),
        ("loss 1\nstep 1 of 20", ["step 1 of 20"]),
        ("step 1", ["step 1"]),
        ("epoch 1", ["epoch 1"]),
    ],
)
def test_an_output_is_compared_line_by_line_but_for_numbers(shown: str, missing: list[str]) -> None:
    assert not_printed(shown, "note\nstep 2  of 30\nmore\nloss 0.5\n") == missing
