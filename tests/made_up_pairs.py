"""A made-up language pair, word by word, in the files that examples/translation.py reads."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {"red": "rot", "house": "Haus", "öl": "Öl", "green": "grün", "tree": "Baum", "sees": "sieht", "the": "das"}


def write_pairs(folder: Path, num_train: int = 400, num_val: int = 24) -> Path:
    """`folder` with train and val, sentences of 3 to 7 words in both languages."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split, count in (("train", num_train), ("val", num_val)):
        sentences = [rng.choices(sorted(WORDS), k=rng.randint(3, 7)) for _ in range(count)]
        english = [" ".join(sentence) + "." for sentence in sentences]
        german = [" ".join(WORDS[word] for word in sentence) + "." for sentence in sentences]
        for side, lines in (("en", english), ("de", german)):
            (folder / f"{split}.{side}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
