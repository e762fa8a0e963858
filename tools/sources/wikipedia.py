"""Plain sentences from pages of Wikipedia in their own markup."""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Iterator

from tools.sources.sentences import sentences

PAGE = re.compile(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.DOTALL)
# Not prose, with all that is inside; what is innermost goes first, until nothing changes.
INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}|\[\[(?:File|Image|Category):[^\[\]]*\]\]", re.IGNORECASE)
APART = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|table|code|nowiki|source|blockquote|div)\b[^>]*?(?:/>|>.*?</\1>)",
    re.DOTALL | re.IGNORECASE,
)
LINK = re.compile(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", re.IGNORECASE)
WEB_LINK = re.compile(r"\[(?:https?:)?//\S+ ?([^\[\]]*)\]")
TAG, QUOTES, SPACES = re.compile(r"<[^<>]*>"), re.compile(r"'{2,}"), re.compile(r"\s+")
# What is left of markup that was not understood, or an empty place where a template stood.
LEFT_OVER = re.compile(r"[\[\]{}|<>=\\*]|\(\s*[,;)]|\s[,.;)]|\.\w")
SENTENCE = re.compile(r"[A-Z\"'].*[.!?\"]")
LEAST_WORDS, MOST_WORDS = 5, 22

Pair = tuple[str, str]


def pages(xml: str) -> Iterator[tuple[str, str]]:
    """Title and markup of each page."""
    for title, text in PAGE.findall(xml):
        yield html.unescape(title), html.unescape(text)


def paragraphs(markup: str) -> Iterator[str]:
    """The paragraphs of a page as plain text; headings, lists and tables are left out."""
    text, before = APART.sub("", markup), ""
    while text != before:
        text, before = INNERMOST.sub("", LINK.sub(r"\1", text)), text
    text = TAG.sub("", QUOTES.sub("", WEB_LINK.sub(r"\1", text)))
    for line in html.unescape(text).splitlines():
        if line[:1].isalpha() or line[:1] in ('"', "'"):
            yield SPACES.sub(" ", line).strip()


def plain(paragraph: str) -> Iterator[str | None]:
    """The sentences of a paragraph in order, None for each that is no whole sentence of moderate length."""
    yield from (sentence if is_plain(sentence) else None for sentence in sentences(paragraph))


def neighbours(paragraph: str) -> Iterator[Pair]:
    """Sentences with the one that follows; none is in two pairs."""
    waiting: str | None = None
    for sentence in plain(paragraph):
        if sentence is not None and waiting is not None:
            yield waiting, sentence
            waiting = None
        else:
            waiting = sentence


def is_plain(sentence: str) -> bool:
    """Whether it is a whole sentence of moderate length, without rests of markup."""
    is_whole = bool(SENTENCE.fullmatch(sentence)) and not LEFT_OVER.search(sentence)
    return is_whole and LEAST_WORDS <= len(sentence.split()) <= MOST_WORDS


def split_of_page(title: str) -> str:
    """Of eight pages one is for validation and two are for the test; all of a page is in one split."""
    return {0: "val", 1: "test", 2: "test"}.get(digest(title)[0] % 8, "train")


def digest(text: str) -> bytes:
    """A hash: sorting by it mixes the pages in an order that depends on nothing else."""
    return hashlib.sha256(text.encode()).digest()


def lines_by_split(xml: str) -> dict[str, list[str]]:
    """Lines of the training split, a sentence each; of the others a sentence, a tab, and the sentence that follows."""
    found: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for title, markup in pages(xml):
        for paragraph in paragraphs(markup):
            if (split := split_of_page(title)) == "train":
                found[split] |= {sentence for sentence in plain(paragraph) if sentence is not None}
            else:
                found[split] |= {"\t".join(pair) for pair in neighbours(paragraph)}
    return {split: sorted(lines, key=digest) for split, lines in found.items()}
