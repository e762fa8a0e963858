"""Sparse weights in the forms of others: torch's CSR, and 2:4 with positions of two bits."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gapfx.errors import UserError
from gapfx.io.sparse_file import SparseFile
from gapfx.masks import unpack

_GROUP, _KEPT = 4, 2


def csr_of(file: SparseFile, key: str) -> Tensor:
    """A sparse weight as torch.sparse_csr, [outputs, all other dimensions flat]; values that are live at 0 stay."""
    weight = file.weight(key)
    assert weight is not None
    rows = weight.shape[0] if weight.shape else 1
    mask = unpack(file.bits(key), weight.shape).view(rows, -1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    with warnings.catch_warnings():
        # Who asks for CSR need not be told once more that torch calls it beta.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state", UserWarning)
        return torch.sparse_csr_tensor(
            starts, mask.nonzero()[:, 1], file.values(key), mask.shape, check_invariants=True
        )


@dataclass(frozen=True)
class TwoOfFour:
    """A weight [R, C] of which two in four neighbours are live: values [R, C / 2], and where they were.

    `places` [R, C / 8], uint8, hold the positions 0 to 3 of four values each, two bits a value, the first in the lowest
    bits. A group of less than two values not 0 is filled with zeros.
    """

    values: Tensor
    places: Tensor

    @staticmethod
    def of(dense: Tensor) -> TwoOfFour:
        """Compress a weight. Raises UserError for one that has no such pattern."""
        rows, columns = dense.shape[0], dense[0].numel()
        if columns % (2 * _GROUP):
            raise UserError(f"rows of {columns} weights are not a multiple of 8", fix="2:4 is for rows that are")
        groups = dense.reshape(rows, -1, _GROUP)
        if int((groups != 0).sum(-1).max()) > _KEPT:
            raise UserError("more than two of four weights are not 0", fix="train with --pattern 2:4")
        # Stable, so that values not 0 come first; then the two in order of place.
        order = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :_KEPT].sort(-1).values
        places = order.view(rows, -1, 4).to(torch.uint8)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
        return TwoOfFour(groups.gather(-1, order).view(rows, -1), (places << shifts).sum(-1, dtype=torch.uint8))

    def dense(self) -> Tensor:
        """The weight [R, C] with its zeros."""
        rows = self.values.shape[0]
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
        order = ((self.places.unsqueeze(-1) >> shifts) & 3).view(rows, -1, _KEPT).long()
        groups = self.values.new_zeros(rows, order.shape[1], _GROUP)
        return groups.scatter_(-1, order, self.values.view(rows, -1, _KEPT)).view(rows, -1)
