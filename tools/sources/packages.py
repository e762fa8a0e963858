"""Packages that carry data sets: fetched by name, read without installing them, and what was made of them written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from gapfx.errors import UserError

DATA = Path(__file__).parents[2] / "examples" / "data"
# LZMA makes arrays a fifth smaller than zlib, and np.load reads it as it is; a fixed date makes equal bytes.
MEMBER_DATE = (2017, 8, 25, 0, 0, 0)
LISTED_FILE = re.compile(r"-\S+ \S+ +(\d+) \S+ \S+ \./(.+)")  # of dpkg-deb --contents: size and name

Out = Annotated[Path | None, typer.Option(help="Folder to write to; by default the one where the example looks.")]
Subset = Annotated[bool, typer.Option("--subset", help="Only the part that comes with the repository.")]


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


def tar_of_deb(path: Path) -> bytes:
    """The files of a Debian package as a tar archive. Raises UserError for one that cannot be read."""
    listed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=False)
    if listed.returncode:
        raise broken(path)
    return listed.stdout


def list_deb(path: Path) -> dict[str, int]:
    """Name -> bytes of the files in a Debian package. Raises UserError for one that cannot be read."""
    listed = subprocess.run(["dpkg-deb", "--contents", str(path)], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise broken(path)
    return {found[2]: int(found[1]) for found in map(LISTED_FILE.fullmatch, listed.stdout.splitlines()) if found}


def stream_deb(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the named files of a Debian package, one at a time: for packages larger than memory.

    Raises UserError for one that cannot be read.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacked:
        try:
            with tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
                for member in archive:
                    if (name := member.name.removeprefix("./")) in names:
                        yield name, read_member(archive, member)
        except tarfile.TarError as error:
            raise broken(path) from error
        finally:
            unpacked.kill()


def read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Content of one file of a tar archive."""
    file = archive.extractfile(member)
    assert file is not None
    return file.read()


def broken(path: Path) -> UserError:
    """The error for a download that cannot be read."""
    return UserError("a downloaded package cannot be read", where=str(path), fix="delete it and run this again")


def check_size(content: bytes, least: int, package: str) -> bytes:
    """The content, when it has at least `least` bytes; else raises UserError."""
    if len(content) < least:
        raise UserError(f"expected at least {least:,} bytes of text from {package}, got {len(content):,}")
    return content


def pack(arrays: Mapping[str, NDArray[Any]], *, is_small: bool) -> bytes:
    """The arrays as the bytes of an .npz file: as small as it gets for the repository, else fast to read."""
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, array in arrays.items():
            member, content = zipfile.ZipInfo(f"{name}.npy", MEMBER_DATE), BytesIO()
            member.compress_type = zipfile.ZIP_LZMA if is_small else zipfile.ZIP_STORED
            np.save(content, array)
            archive.writestr(member, content.getvalue())
    return packed.getvalue()


def write(path: Path, content: bytes, licence: str) -> None:
    """Put the content under `path` in one move, and say what it is and under which licence."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
    typer.echo(f"{path}: {len(content):,} bytes. {licence}.")
