"""Routed generation and the budget it keeps."""
