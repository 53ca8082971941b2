"""What shows that a device computes as it should: kernels against stored digests, memory, rates."""
