"""`python -m gapfx`: the command line, also as a rank that `gapfx.runtime.launch` started."""

from __future__ import annotations

import sys

from gapfx.runtime.launch import die_with_launcher

if __name__ == "__main__":
    die_with_launcher()
    from gapfx.cli import main

    sys.exit(main())
