"""Floor 4: HTTP only."""
