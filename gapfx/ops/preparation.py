"""What the runtime asks of the kernels behind the sparse ops, linear layers and convolutions alike."""

from gapfx.kernels import preparation

preparation_seconds = preparation.preparation_seconds
