"""English and German of one document as pairs, found by its structure alone: catalogues, HTML pages, manual pages.

Nothing is guessed from words: what stands at the same place of the same structure is a pair, everything else is left.
"""

from __future__ import annotations

import difflib
import gzip
import html
import re
import struct
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser

from tools.sources.roff import roff_blocks

Pair = tuple[str, str]  # English, German
Block = tuple[str, str]  # kind (a tag or a macro), text

MO_MAGIC = 0x950412DE
LEAST_RUN = 6  # blocks in a row of the same kinds, in two pages that differ elsewhere
TEXT_TAGS = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "td", "th", "caption", "title"])
BREAKING_TAGS = TEXT_TAGS | {"div", "ul", "ol", "table", "dl"}
SKIPPED_TAGS = frozenset(("script", "style", "pre"))


def one_line(text: str) -> str:
    """The text with single spaces, without soft hyphens."""
    return " ".join(text.replace("\u00ad", "").split())


def numbers(text: str) -> list[str]:
    """The numbers in a text, sorted: a translation keeps them."""
    return sorted(re.findall(r"\d+", text))


def align(english: Sequence[Block], german: Sequence[Block], *, is_strict: bool) -> Iterator[Pair]:
    """Texts at the same places: all when the kinds agree; else, unless strict, runs of agreeing kinds and numbers."""
    kinds, german_kinds = [kind for kind, _ in english], [kind for kind, _ in german]
    if kinds == german_kinds:
        yield from ((en, de) for (_, en), (_, de) in zip(english, german, strict=True) if en and de)
    elif not is_strict:
        matcher = difflib.SequenceMatcher(None, kinds, german_kinds, autojunk=False)
        for i, j, length in matcher.get_matching_blocks():
            run = zip(english[i : i + length], german[j : j + length], strict=True) if length >= LEAST_RUN else ()
            yield from ((en, de) for (_, en), (_, de) in run if en and de and numbers(en) == numbers(de))


def man_pairs(english: bytes, german: bytes) -> Iterator[Pair]:
    """Pairs of two gzipped manual pages; their versions may differ, so that only parts agree."""
    pages = [roff_blocks(gzip.decompress(page).decode("utf-8", "replace")) for page in (english, german)]
    ends = [i for i, (kind, text) in enumerate(pages[1]) if kind == "SH" and text.startswith("ÜBERSETZUNG")]
    yield from align(pages[0], pages[1][: ends[0]] if ends else pages[1], is_strict=False)


def manual_pairs(english: bytes, german: bytes) -> Iterator[Pair]:
    """Pairs of two HTML pages whose elements are the same throughout; none where they are not."""
    pages = [[(kind, text) for kind, text, _ in html_blocks(page)] for page in (english, german)]
    yield from align(*pages, is_strict=True)


def help_pairs(english: bytes, german: bytes) -> Iterator[Pair]:
    """Pairs of two pages of LibreOffice's help: paragraphs and headings with the same id."""
    by_id = {block_id: text for _, text, block_id in html_blocks(german) if block_id}
    for _, text, block_id in html_blocks(english):
        if re.match(r"(par|hd)_", block_id) and block_id in by_id:
            yield text, by_id[block_id]


def html_blocks(page: bytes) -> list[tuple[str, str, str]]:
    """(tag, text, id) of every element with text of its own, in order; scripts and listings are left out."""
    parser = _Blocks()
    parser.feed(page.decode("utf-8", "replace"))
    parser.end_block()
    return parser.blocks


class _Blocks(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str, str]] = []
        self.tag, self.id, self.parts, self.depth_skipped = "", "", list[str](), 0

    def end_block(self, tag: str = "", block_id: str = "") -> None:
        text = one_line("".join(self.parts))
        if text and self.tag:
            self.blocks.append((self.tag, text, self.id))
        self.tag, self.id, self.parts = tag, block_id, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth_skipped += tag in SKIPPED_TAGS
        if tag in BREAKING_TAGS:
            self.end_block(tag if tag in TEXT_TAGS else "", dict(attrs).get("id") or "")
        elif tag == "br":
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.depth_skipped = max(0, self.depth_skipped - (tag in SKIPPED_TAGS))
        if tag in BREAKING_TAGS:
            self.end_block()

    def handle_data(self, data: str) -> None:
        if not self.depth_skipped:
            self.parts.append(data)


def catalogue_pairs(content: bytes) -> Iterator[Pair]:
    """Pairs of a compiled gettext catalogue (.mo), paragraph by paragraph where both sides have equally many."""
    for key, value in mo_messages(content):
        en, de = (readable(side) for side in (key, value))
        paragraphs = [re.split(r"\n\s*\n", side) for side in (en, de)]
        if len(paragraphs[0]) == len(paragraphs[1]):
            yield from zip(*paragraphs, strict=True)
        else:
            yield en, de


def mo_messages(content: bytes) -> Iterator[Pair]:
    """(message, translation) of a catalogue, the singular of each; without contexts and the header."""
    order = "<" if struct.unpack_from("<I", content)[0] == MO_MAGIC else ">"
    _, _, count, *starts = struct.unpack_from(f"{order}5I", content)
    for index in range(count):
        spans = (struct.unpack_from(f"{order}2I", content, start + 8 * index) for start in starts)
        texts = [content[at : at + size].decode("utf-8", "replace").split("\0")[0] for size, at in spans]
        message = texts[0].rpartition("\x04")[2]
        if message and texts[1] and "\ufffd" not in texts[1]:
            yield message, texts[1]


def readable(message: str) -> str:
    """A message of a program without tags, character entities and the marks (& or _) of keyboard shortcuts."""
    text = re.sub(r"<[^>]{1,80}>", "", message)
    text = html.unescape(text) if "&" in text and ";" in text else text
    text = re.sub(r"(?<![&\w ])&(?=\w)|(?<=\w)&(?=\w)|(?<= )&(?=\w)", "", text)
    return re.sub(r"(?<![\w%{(])_(?=\w)|(?<=[^\W\d_])_(?=[a-zäöüß]+\b)", "", text) if text.count("_") == 1 else text
