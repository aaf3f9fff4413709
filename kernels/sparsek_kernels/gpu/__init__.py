"""The same definition as Triton kernels: selection, forward, backward, decoding, and the operator alone."""
