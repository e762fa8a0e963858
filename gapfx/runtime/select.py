"""The highest scores of one tensor, or of several, that ranks hold in slices: an exact threshold from histograms.

Among equal scores the earlier tensor, then the lower flat index wins, whatever the number of ranks (gapfx.threshold).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from gapfx.pattern import top_mask
from gapfx.runtime.ranks import Peers
from gapfx.threshold import Keys, digit_counts, key_of, search

_WIDTH = 32


def top_of_slices(score: Tensor, num_kept: int, peers: Peers) -> Tensor:
    """Bool mask of this rank's slice: True at its share of the `num_kept` highest scores of all slices (collective).

    Slices follow one another by rank. The same as `gapfx.pattern.top_mask` of the whole. Scores may not be NaN.
    """
    if peers.size == 1:
        return top_mask(score, num_kept)
    keys = Keys.of(score)
    found = keys.threshold(num_kept, peers.total)
    ties = peers.tell(found.num_tied)
    return keys.mark(found.key, num_kept - found.num_above - sum(ties[: peers.rank])).view(score.shape)


def top_of_all(scores: Sequence[Callable[[], Tensor]], num_kept: int, peers: Peers) -> Iterator[Tensor]:
    """Flat bool mask of this rank's slice of one tensor after another: the `num_kept` highest scores of all together.

    Each tensor keeps its highest score, so `num_kept` is at least their number. `scores` make this rank's slice of each
    tensor's scores, compared as fp32, the same at every call: those of one tensor are held at a time. Collective, also
    between masks; every rank takes them all.
    """
    highest = _highest(scores, peers)

    def counts(shift: int, prefix: int | None) -> Tensor:
        # The highest of each tensor are kept anyway, the others compete for what is left.
        found = digit_counts(highest if peers.rank == 0 else (), shift, prefix).neg_()
        for score in scores:
            found += _keys(score).counts(shift, prefix)
        return peers.total(found)

    num_free = num_kept - len(scores)
    key, num_above = search(counts, _WIDTH, num_free)
    num_left = num_free - num_above
    for score, top in zip(scores, highest, strict=True):
        keys, lowest = _keys(score), min(key, top)
        ties: list[int] = peers.tell(keys.num_equal(lowest))
        num_own = int(top <= key)  # the highest itself is at the threshold, or below it
        num_taken = min(num_left, sum(ties) - num_own) if lowest == key else 0
        num_left -= num_taken
        yield keys.mark(lowest, num_own + num_taken - sum(ties[: peers.rank]))


def _keys(score: Callable[[], Tensor]) -> Keys:
    return Keys.of(score().float())


def _highest(scores: Sequence[Callable[[], Tensor]], peers: Peers) -> list[int]:
    """The key of the highest score of each tensor (collective)."""
    own: list[int] = []
    for score in scores:
        value = score().float()
        own.append(key_of(value.max()) if value.numel() else -1)
    return [max(keys) for keys in zip(*peers.tell(own), strict=True)]
