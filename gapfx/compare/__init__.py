"""`gapfx compare`: methods, sparsities and seeds of one task side by side, at equal epochs and at equal operations."""
