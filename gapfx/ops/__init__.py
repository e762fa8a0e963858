"""The `gapfx::` torch ops; importing this module defines them."""

from gapfx.ops.mask import mask as mask
