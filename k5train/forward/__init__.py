"""The forward pass of the transformer: blocks, kernels, attention, compilation, streaming, loading by a plan."""
