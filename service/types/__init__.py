"""Floor 0: plain data that every room may speak. Standard library only."""
