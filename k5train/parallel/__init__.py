"""Several processes that train one LoRA, one on each GPU: how they start, talk, add their gradients, and end."""
