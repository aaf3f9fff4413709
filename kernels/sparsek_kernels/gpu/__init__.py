"""SPARSEK attention in Triton: selection, forward and backward for GPUs."""
