"""One forward pass of the transformer: blocks, kernels, attention, compilation, streaming."""
