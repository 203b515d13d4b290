"""Serving versioned language and multimodal models over HTTP."""

__version__ = "0.1.0"
