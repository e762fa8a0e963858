"""English to German: sentences of translated software documentation, from Debian packages."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

from gapfx.errors import UserError
from tools.sources.bilingual import Pair, catalogue_pairs, help_pairs, man_pairs, manual_pairs
from tools.sources.packages import DATA, Out, broken, fetch_deb, read_member, tar_of_deb, write
from tools.sources.sentences import place_of, sentence_pairs, split_of

LICENCE = (
    "Licences: LibreOffice help MPL-2.0, manual pages GPL-3+ and others, manuals GPL-2+, catalogues as their programs; "
    "train on it, do not pass it on without their notices"
)
# What most pairs come from.
DOCUMENTS = [
    "libreoffice-help-de",
    "libreoffice-help-en-us",
    "manpages-de",
    "manpages",
    "manpages-dev",
    "systemd",
    "coreutils",
    "util-linux",
    "procps",
    "debian-reference-de",
    "debian-reference-en",
    "developers-reference",
    "developers-reference-de",
    "debian-faq",
    "debian-faq-de",
]
# Programs with long messages; a release of Debian may lack some.
CATALOGUES = [
    "gcc-12-locales",
    "util-linux-locales",
    "vlc-l10n",
    "gramps",
    "git",
    "gnucash-common",
    "gnupg-l10n",
    "krita-l10n",
    "cinnamon-l10n",
    "tellico-data",
    "gnome-control-center-data",
    "claws-mail-i18n",
]
# The first group names a document in both languages.
KINDS = {
    "help": re.compile(r"/libreoffice/help/(?:de|en-US)/(.+)\.html$"),
    "man": re.compile(r"/man/(?:de/)?(man\d/[^/]+)\.gz$"),
    "manual": re.compile(
        r"/((?:debian-reference|developers-reference|debian/FAQ)/(?:de/)?[^/]+?)(?:\.(?:de|en))?\.html$"
    ),
    "catalogue": re.compile(r"/de/LC_MESSAGES/(.+)\.mo$"),
}
READERS = {"help": help_pairs, "man": man_pairs, "manual": manual_pairs}
LEAST_PAIRS = {"train": 40_000, "val": 700, "test": 700}

Documents = dict[tuple[str, str], bytes]  # (kind, name) to content
Splits = dict[str, list[Pair]]


def translation(out: Out = None) -> None:
    """About 50,000 English sentences and their German from documentation, 27 Debian packages (64 MB)."""
    folder = out or DATA / "translation-full"
    english, german = Documents(), Documents()
    for path in packages(folder):
        for kind, name, is_translated, content in documents(path):
            (german if is_translated else english)[kind, name] = content
    splits = split(sentence_pairs(all_pairs(english, german)))
    check_pairs(splits)
    for name, pairs in splits.items():
        for language, side in (("en", 0), ("de", 1)):
            write(folder / f"{name}.{language}", "".join(pair[side] + "\n" for pair in pairs).encode(), LICENCE)


def packages(folder: Path) -> Iterator[Path]:
    """The packages, fetched one by one; a catalogue that this release of Debian lacks is passed over."""
    yield from (fetch_deb(package, folder) for package in DOCUMENTS)
    for package in CATALOGUES:
        try:
            yield fetch_deb(package, folder)
        except UserError as error:
            if "Unable to locate" not in error.what:
                raise
            typer.echo(f"{package} is not in this release: left out")


def documents(path: Path) -> Iterator[tuple[str, str, bool, bytes]]:
    """(kind, name, whether German, content) of each text of a package."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tar_of_deb(path))) as archive:
            for member in archive:
                for kind in KINDS if member.isfile() else ():
                    if name := name_of(kind, member.name):
                        yield kind, name, is_german(member.name), read_member(archive, member)
    except tarfile.TarError as error:
        raise broken(path) from error


def name_of(kind: str, path: str) -> str:
    """What a document of this kind is called in both languages; "" for another document."""
    found = KINDS[kind].search(path)
    return found[1].replace("/de/", "/") if found else ""


def is_german(path: str) -> bool:
    """Whether a path of a package is that of a German document."""
    return bool(re.search(r"/de/|\.de\.html$", path))


def all_pairs(english: Documents, german: Documents) -> Iterator[Pair]:
    """The pairs of every document that is there in both languages, in one order whatever the order of packages."""
    for (kind, name), content in sorted(german.items()):
        if kind == "catalogue":
            yield from catalogue_pairs(content)
        elif (kind, name) in english:
            yield from READERS[kind](english[kind, name], content)


def split(pairs: Iterable[Pair]) -> Splits:
    """The pairs by split, in an order that mixes their sources: the first of them stand for all."""
    splits: Splits = {name: [] for name in LEAST_PAIRS}
    for pair in sorted(pairs, key=lambda pair: (place_of(pair[0]), pair)):
        splits[split_of(pair[0])].append(pair)
    return splits


def check_pairs(splits: Splits) -> None:
    """Raises UserError when a split is smaller than it ever was: then packages have changed their form."""
    for name, least in LEAST_PAIRS.items():
        if len(splits[name]) < least:
            raise UserError(f"expected at least {least:,} pairs of sentences for {name}, got {len(splits[name]):,}")
