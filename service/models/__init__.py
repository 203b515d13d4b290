"""Floor 1: what the networks are. Knows tensors and specs, not caches, batches or files."""
