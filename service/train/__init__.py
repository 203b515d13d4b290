"""Floor 4: training: corpora, loops and committed recipes."""
