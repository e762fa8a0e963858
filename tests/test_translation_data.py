"""The corpus of the translation example: pairs found in catalogues, manual pages and help, and what is kept of them."""

from __future__ import annotations

import gzip
import itertools
import struct

import pytest

from gapfx.errors import UserError
from tools.sources import translation as source
from tools.sources.bilingual import align, catalogue_pairs, help_pairs, man_pairs, manual_pairs, readable
from tools.sources.sentences import is_prose, sentence_pairs, sentences, split_of


def mo_file(messages: dict[str, str], order: str = "<") -> bytes:
    texts = [text.encode() for side in (messages, messages.values()) for text in side]
    at, tables = 28 + 8 * len(texts), b""
    for text in texts:
        tables += struct.pack(f"{order}2I", len(text), at)
        at += len(text) + 1
    start, count = 28, len(messages)
    head = struct.pack(f"{order}7I", 0x950412DE, 0, count, start, start + 8 * count, 0, 0)
    return head + tables + b"".join(text + b"\0" for text in texts)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_catalogue_gives_its_messages_without_header_context_and_plural(order: str) -> None:
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        "menu\x04_Open <b>file</b>": "Datei ö_ffnen",
        "One file\0Many files": "Eine Datei\0Viele Dateien",
        "First.\n\nSecond.": "Erstens.\n\nZweitens.",
        "First.\n\nLast.": "Alles in einem.",
        "Not translated": "",
    }
    assert list(catalogue_pairs(mo_file(messages, order))) == [
        ("Open file", "Datei öffnen"),
        ("One file", "Eine Datei"),
        ("First.", "Erstens."),
        ("Second.", "Zweitens."),
        ("First.\n\nLast.", "Alles in einem."),
    ]


def test_marks_of_shortcuts_go_and_other_marks_stay() -> None:
    assert readable("&Save as") == "Save as"
    assert readable("_Save as") == "Save as"
    assert readable("Black & white") == "Black & white"
    assert readable("A &lt;tag&gt;") == "A <tag>"
    assert readable("use %s_name and a_b") == "use %s_name and a_b"


def man_page(*parts: str) -> bytes:
    return gzip.compress("\n".join(parts).encode())


def test_pages_of_a_manual_with_the_same_macros_are_aligned() -> None:
    english = man_page('.\\" a comment', '.TH LS 1 "today"', ".SH NAME", "ls \\- list", ".B files", ".PP", "It lists.")
    german = man_page('.TH LS 1 "heute"', ".SH NAME", "ls \\- listet", "\\fBDateien\\fP auf", ".PP", "Es listet.")
    translator = man_page(
        '.TH LS 1 "heute"', ".SH NAME", "ls \\- listet", ".PP", "Es listet.", ".SH ÜBERSETZUNG", "Ich"
    )
    expected = [("NAME", "NAME"), ("ls - list files", "ls - listet Dateien auf"), ("It lists.", "Es listet.")]
    assert list(man_pairs(english, german)) == expected
    assert [de for _, de in man_pairs(english, translator)] == ["NAME", "ls - listet", "Es listet."]


def test_examples_in_a_manual_page_are_left_out() -> None:
    english = man_page("Before.", ".EX", "ls -l", ".EE", "After.")
    german = man_page("Davor.", ".EX", "ls -l # alles", ".EE", "Danach.")
    assert list(man_pairs(english, german)) == [("Before.", "Davor."), ("After.", "Danach.")]


def test_pages_that_differ_give_long_runs_with_the_same_numbers_alone() -> None:
    run = [("T", f"number {i}") for i in range(6)]
    german = [("T", f"Nummer {i}") for i in range(5)] + [("T", "Nummer 7")]
    pairs = list(align([("SH", "A"), *run], german, is_strict=False))
    assert pairs == [(f"number {i}", f"Nummer {i}") for i in range(5)]
    assert list(align([("SH", "A"), *run[:5]], german[:5], is_strict=False)) == []
    assert list(align([("SH", "A"), *run], german, is_strict=True)) == []


def test_help_is_aligned_by_the_ids_of_its_paragraphs() -> None:
    english = (
        b'<h1 id="hd_1">Files</h1><p id="par_2">Open&nbsp;a <b>file</b>.</p><p id="x">No.</p><p id="par_3">New.</p>'
    )
    german = '<p id="par_2">Öffnet eine Datei.</p><script>var a</script><h1 id="hd_1">Dateien</h1><p id="x">Nein.</p>'
    assert list(help_pairs(english, german.encode())) == [
        ("Files", "Dateien"),
        ("Open a file.", "Öffnet eine Datei."),
    ]


def test_pages_of_html_are_aligned_only_when_their_elements_agree() -> None:
    english, german = b"<h1>A</h1><p>One</p><pre>$ ls</pre><ul><li>Two</li></ul>", b"<h1>B</h1><p>Eins</p><li>Zwei</li>"
    assert list(manual_pairs(english, german)) == [("A", "B"), ("One", "Eins"), ("Two", "Zwei")]
    assert list(manual_pairs(english, german + b"<p>Mehr</p>")) == []


def test_sentences_are_not_cut_behind_abbreviations() -> None:
    assert sentences("Das gilt z. B. Hier. Und dort!") == ["Das gilt z. B. Hier.", "Und dort!"]
    assert sentences("Use e.g. This one. Or 2.") == ["Use e.g. This one.", "Or 2."]


@pytest.mark.parametrize(
    ("en", "de", "expected"),
    [
        ("The file was opened with 2 windows.", "Die Datei wurde mit 2 Fenstern geöffnet.", True),
        ("The file was opened with 2 windows.", "Die Datei wurde mit 3 Fenstern geöffnet.", False),
        ("Open the file", "Die Datei öffnen", False),
        ("The file %s was opened again.", "Die Datei %s wurde wieder geöffnet.", False),
        ("See the file /etc/passwd for more.", "Siehe die Datei /etc/passwd für mehr.", False),
        ("This is the text of the file.", "This is the text of a file.", False),
        ("Opened it.", "Es geöffnet.", False),
        ("The file was opened again by hand.", "Die Datei da.", False),
    ],
)
def test_prose_is_a_sentence_and_its_translation(en: str, de: str, expected: bool) -> None:
    assert is_prose(en, de) is expected


def test_paragraphs_are_cut_where_both_sides_have_equally_many_sentences() -> None:
    pair = ("The file is here now. It was opened by hand.", "Die Datei ist jetzt hier. Sie wurde von Hand geöffnet.")
    uneven = ("The file is here, and it was opened.", "Die Datei ist hier. Sie wurde geöffnet.")
    found = list(sentence_pairs([pair, uneven, pair]))
    assert [en for en, _ in found] == ["The file is here now.", "It was opened by hand.", uneven[0]]


def test_no_english_sentence_is_in_two_splits() -> None:
    texts = [
        f"The {a} of the {b} is {c}." for a, b, c in itertools.product(["sea", "sky", "sun"], "abcdefgh", "klmnopq")
    ]
    pairs = [(en, de) for text in texts for en in (text, text.upper(), f"{text} 7") for de in ("Ja.", "Nein.")]
    splits = source.split(pairs)
    assert sum(map(len, splits.values())) == len(pairs)
    letters = [{"".join(c for c in en.lower() if c.isalpha()) for en, _ in part} for part in splits.values()]
    assert all(part for part in letters)
    assert all(not a & b for a, b in itertools.combinations(letters, 2))
    assert len(splits["train"]) > 0.9 * len(pairs)
    assert split_of("It is here.") == split_of("IT IS 3 HERE!")


def test_a_split_mixes_its_sources_and_does_not_depend_on_their_order() -> None:
    pairs = [(f"The {a} {b} is here.", "Ja.") for a in "abcdefgh" for b in "klmnopqr"]
    train = source.split(pairs)["train"]
    assert train == source.split(reversed(pairs))["train"]
    assert len({en[4] for en, _ in train[:16]}) > 4


def test_documents_are_paired_by_name_whatever_the_order() -> None:
    page = b'<p id="par_1">%s</p>'
    english = {("help", "b"): page % b"B", ("help", "a"): page % b"A"}
    german = {("help", "b"): page % b"BB", ("help", "c"): page % b"CC", ("help", "a"): page % b"AA"}
    assert list(source.all_pairs(english, german)) == [("A", "AA"), ("B", "BB")]


@pytest.mark.parametrize(
    ("kind", "en", "de"),
    [
        ("help", "./usr/share/libreoffice/help/en-US/text/a.html", "./usr/share/libreoffice/help/de/text/a.html"),
        ("man", "./usr/share/man/man1/ls.1.gz", "./usr/share/man/de/man1/ls.1.gz"),
        ("manual", "./usr/share/debian-reference/ch01.en.html", "./usr/share/debian-reference/ch01.de.html"),
        ("manual", "./usr/share/developers-reference/a.html", "./usr/share/developers-reference/de/a.html"),
        ("manual", "./usr/share/doc/debian/FAQ/a.en.html", "./usr/share/doc/debian/FAQ/de/a.de.html"),
    ],
)
def test_a_document_has_one_name_in_both_languages(kind: str, en: str, de: str) -> None:
    assert source.name_of(kind, en) == source.name_of(kind, de) != ""
    assert source.is_german(de)
    assert not source.is_german(en)


def test_a_corpus_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"at least 40,000 pairs of sentences for train, got 1"):
        source.check_pairs({"train": [("a", "b")], "val": [], "test": []})
