"""Pairs of paragraphs made into pairs of sentences, and the sentences that are worth to train on told from the rest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from tools.sources.bilingual import Pair, numbers, one_line

SENTENCE_END = re.compile(r"(?<=[.!?])[\"”“'’)»«]*\s+(?=[A-ZÄÖÜ0-9\"„“»(])")  # noqa: RUF001
ABBREVIATION = re.compile(
    r"\b(z\.|d\.|u\.|bzw\.|e\.g\.|i\.e\.|etc\.|Mr\.|Dr\.|St\.|Nr\.|No\.|vs\.|ca\.|\d\.|[A-Z]\.|a\.|B\.|h\.|o\.|evtl\."
    r"|ggf\.|usw\.|approx\.|Fig\.|Abb\.)$"
)
CODE = re.compile(r"[{}<>|\\=\t]|%[\w(]|\$\w|--\w|https?://|/\w+/|_\w|\w_")
GERMAN_WORDS = frozenset(
    [
        "der",
        "die",
        "das",
        "und",
        "ist",
        "sie",
        "nicht",
        "mit",
        "ein",
        "eine",
        "von",
        "zu",
        "auf",
        "wird",
        "werden",
        "für",
        "den",
        "dem",
        "im",
        "in",
        "sich",
        "oder",
        "als",
        "es",
        "ihr",
        "ich",
        "du",
        "wir",
        "kann",
        "können",
    ]
)
ENGLISH_WORDS = frozenset(["the", "and", "is", "of", "to", "with", "you", "for", "are", "this", "that", "be"])
SPLIT_SHARES = {"val": 0.02, "test": 0.02}  # the rest is for training


def sentence_pairs(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Pairs of prose sentences, each once; a paragraph is cut where both sides have equally many sentences."""
    seen: set[Pair] = set()
    for pair in pairs:
        en, de = (sentences(one_line(side)) for side in pair)
        for found in zip(en, de, strict=True) if len(en) == len(de) else [(" ".join(en), " ".join(de))]:
            key = (found[0].lower(), found[1].lower())
            if key not in seen and is_prose(*found):
                seen.add(key)
                yield found


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; not cut behind the abbreviations that both languages use."""
    found, start = list[str](), 0
    for match in SENTENCE_END.finditer(text):
        if not ABBREVIATION.search(text[start : match.start()]):
            found.append(text[start : match.end()].strip())
            start = match.end()
    return [*found, text[start:].strip()]


def is_prose(en: str, de: str) -> bool:
    """Whether two texts are a full sentence and its translation: no code, no label, nothing untranslated."""
    en_words, de_words = en.split(), de.split()
    if not (4 <= len(en_words) <= 60 and 3 <= len(de_words) <= 70):
        return False
    if en[-1] not in '.!?"”:' or de[-1] not in '.!?"“”«»:' or CODE.search(en):
        return False
    if sum(c.isalpha() or c == " " for c in en) < 0.85 * len(en):
        return False
    return numbers(en) == numbers(de) and 0.55 < len(de) / len(en) < 2.2 and is_translated(en_words, de_words)


def is_translated(en_words: list[str], de_words: list[str]) -> bool:
    """Whether the German side is German, by its short words and by how few words both sides share."""
    bare = {word.lower().strip(".,!?") for word in de_words}
    if len(bare & ENGLISH_WORDS) >= 2 and not bare & GERMAN_WORDS:
        return False
    shared = {word.lower() for word in de_words} & {word.lower() for word in en_words}
    return len(shared) <= 0.6 * len(de_words)


def split_of(en: str) -> str:
    """`train`, `val` or `test`, by the place of the English side."""
    place = place_of(en)
    if place < SPLIT_SHARES["val"]:
        return "val"
    return "test" if place < SPLIT_SHARES["val"] + SPLIT_SHARES["test"] else "train"


def place_of(en: str) -> float:
    """A number from 0 to 1 that a hash of the letters gives.

    Sentences that differ in case, numbers and punctuation alone, and all translations of one, have one place.
    """
    letters = re.sub(r"[^a-z]", "", en.lower())
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:4]) / 2**32
