"""A note where a last layer may lose whole outputs."""

from __future__ import annotations

import torch
from torch import nn

from gapfx.sparse import CompileOptions, compile_model


def notes(classes: int, **options: object) -> tuple[str, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, classes))
    x = torch.randn(2, 40)
    made = compile_model(model, lambda m: m(x), CompileOptions(groups=1, **options))  # type: ignore[arg-type]
    return tuple(note for note in made.notes if "outputs" in note)


def test_a_last_layer_with_fewer_than_two_live_weights_an_output_is_told_of() -> None:
    [note] = notes(10, sparsity=0.98)
    assert note.startswith("2.weight: 13 live weights for 10 outputs, of which some may get none")
    assert "--dense last" in note


def test_nothing_is_told_of_enough_weights_or_of_a_dense_end() -> None:
    assert notes(10, sparsity=0.95) == ()
    assert notes(10, sparsity=0.98, dense=("last",)) == ()
    assert notes(10, sparsity=0.98, allocation="erk") == ()
