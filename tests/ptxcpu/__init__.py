"""Runs compiled CUDA kernels without a GPU and looks at their machine code: see README.md."""
