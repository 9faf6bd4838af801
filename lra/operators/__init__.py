"""The operators of `lra.kernels`: parity with their references, diagnosis, timings."""
