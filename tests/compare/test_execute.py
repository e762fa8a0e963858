"""How the runs of a study are started."""

from __future__ import annotations

from gapfx.compare.execute import flags_of


def test_settings_become_flags() -> None:
    given = {"phase_epochs": 0.5, "calibrate": False, "prune_embeddings": True, "dense": ["first", "*.head"]}
    assert flags_of(given) == [
        *("--phase-epochs", "0.5", "--no-calibrate", "--prune-embeddings"),
        *("--dense", "first", "--dense", "*.head"),
    ]
