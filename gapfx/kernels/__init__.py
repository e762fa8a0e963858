"""Native CPU kernels: C++ with a plain C ABI, built when gapfx is installed, and their loader."""
