"""The passes of gapfx, one a file; importing this package puts them into PASSES."""

from __future__ import annotations

from gapfx.compiler import Observer, Pipeline
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.passes.find_blocks import FindBlocks
from gapfx.passes.find_weights import FindWeights
from gapfx.passes.fold_masks import FoldMasks
from gapfx.passes.insert_masks import InsertMasks
from gapfx.passes.partition import Partition
from gapfx.passes.tie_weights import TieWeights

__all__ = [
    "AllocateSparsity",
    "FindBlocks",
    "FindWeights",
    "FoldMasks",
    "InsertMasks",
    "Partition",
    "TieWeights",
    "default_pipeline",
]

DEFAULT_FIND, DEFAULT_PARTITION, DEFAULT_ALLOCATION = FindWeights(), Partition(), AllocateSparsity()


def default_pipeline(
    find: FindWeights = DEFAULT_FIND,
    partition: Partition = DEFAULT_PARTITION,
    allocate: AllocateSparsity = DEFAULT_ALLOCATION,
    observer: Observer | None = None,
) -> Pipeline:
    """From a fresh unit to one whose owners are masked by a plan; `fold-masks` is for after the training."""
    analyses = (TieWeights(), find, FindBlocks(), partition, allocate)
    return Pipeline((*analyses, InsertMasks()), observer)
