"""Floor 2: model files: from a directory to a spec and to tensors, and back."""
