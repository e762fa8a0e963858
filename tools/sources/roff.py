"""Manual pages read as blocks: the macros in their order, with the text between them."""

from __future__ import annotations

import re

FONT_MACROS = frozenset(["B", "I", "R", "BR", "IR", "RB", "RI", "BI", "IB"])
SECTION_MACROS = frozenset(("SH", "SS"))
# They set no text, and translated pages use them at other places.
SILENT_MACROS = frozenset(
    ["TH", "ds", "ie", "el", "if", "ne", "ad", "nh", "hy", "de", "UR", "UE", "MT", "ME", "SM", "br", "na", "ll", "ta"]
)
EXAMPLE_STARTS, EXAMPLE_ENDS = frozenset(("nf", "EX")), frozenset(("fi", "EE"))
REMOVED = re.compile(r"\\f\[[A-Z]*\]|\\f[A-Z]|\\f\(..|\\[&/,|c]|\\s[-+]?\d")
CHARACTERS = {
    r"\-": "-",
    r"\(aq": "'",
    r"\[aq]": "'",
    r"\*(Aq": "'",
    r"\(em": "—",
    r"\(en": "-",
    r"\(lq": "“",
    r"\(rq": "”",
    r"\(bu": "•",
    r"\~": " ",
    r"\ ": " ",
    r"\e": "\\",  # last: what it makes is no escape
}


def roff_blocks(page: str) -> list[tuple[str, str]]:
    """(macro, text) in order; running text has the macro T, only T and section titles have text. Examples are left."""
    reader = _Reader()
    for line in page.split("\n"):
        reader.read(line)
    reader.end_text()
    return reader.blocks


def plain(text: str) -> str:
    """Text without roff's fonts and sizes, its named characters written out."""
    text = REMOVED.sub("", text)
    for escape, character in CHARACTERS.items():
        text = text.replace(escape, character)
    return text


class _Reader:
    def __init__(self) -> None:
        self.blocks: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.is_example = False

    def end_text(self) -> None:
        if self.words:
            self.blocks.append(("T", " ".join(" ".join(self.words).split())))
            self.words = []

    def read(self, line: str) -> None:
        found = re.match(r"[.'] *([A-Za-z]+)\b(.*)", line)
        if found:
            self.macro(found[1], found[2].strip())
        elif (line[:1] in (".", "'") and not line[1:2].isalnum()) or self.is_example:
            return  # a comment or an empty request, or a line of an example
        elif line.strip():
            self.words.append(plain(line))
        else:
            self.end_text()

    def macro(self, name: str, rest: str) -> None:
        if name in EXAMPLE_STARTS | EXAMPLE_ENDS:
            self.end_text()
            self.is_example = name in EXAMPLE_STARTS
            self.blocks.append((name, ""))
        elif self.is_example or name in SILENT_MACROS:
            return
        elif name in FONT_MACROS:
            words = [word.strip('"') for word in re.findall(r'"[^"]*"?|\S+', rest)]
            self.words.append(plain(("" if len(name) == 2 else " ").join(words)))
        else:
            self.end_text()
            self.blocks.append((name, plain(rest.strip('"')) if name in SECTION_MACROS else ""))
