"""The passes of gapfx, one a file; importing this package puts them into PASSES."""

from __future__ import annotations

from gapfx.compiler import Observer, Pipeline
from gapfx.passes.allocate_sparsity import AllocateSparsity
from gapfx.passes.choose_kernels import ChooseKernels
from gapfx.passes.find_blocks import FindBlocks
from gapfx.passes.find_roles import FindRoles
from gapfx.passes.find_weights import FindWeights
from gapfx.passes.fold_masks import FoldMasks
from gapfx.passes.insert_masks import InsertMasks
from gapfx.passes.lower_compact import LowerCompact
from gapfx.passes.lower_inference import LowerInference
from gapfx.passes.lower_sparse import LowerSparse
from gapfx.passes.partition import Partition
from gapfx.passes.tie_weights import TieWeights

__all__ = [
    "AllocateSparsity",
    "ChooseKernels",
    "FindBlocks",
    "FindRoles",
    "FindWeights",
    "FoldMasks",
    "InsertMasks",
    "LowerCompact",
    "LowerInference",
    "LowerSparse",
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
