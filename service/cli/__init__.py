"""Floor 5: the commands; the only place that knows every room."""
