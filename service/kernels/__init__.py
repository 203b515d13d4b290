"""Floor 0: tensors in, tensors out. Imports nothing of ours."""
